#!lua
-- Make a version whose weights and moments have been written under their names the model's head, and
-- consume the contributions that it was made from: one decision.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] contributions  KEYS[5] waiting  KEYS[6] expiry
-- KEYS[7] requests  KEYS[8] request times
-- ARGV[1] incarnation  ARGV[2] head that it was made from (24)  ARGV[3] new head: number (8) and digest (16)
-- ARGV[4] 16 bytes that name the request  ARGV[5] digest of its content (16) and its answer
-- ARGV[6] names of the contributions, 32 bytes each  ARGV[7] entry of the version
-- ARGV[8] prefix of weights  ARGV[9] prefix of moments  ARGV[10] prefix of gradients
-- ARGV[11] time for which a consumed name is remembered (ms)  ARGV[12] … a superseded version is kept (ms)
-- ARGV[13] most bytes of superseded versions  ARGV[14] most requests remembered
-- Returns {PUBLISHED} | {REPLAYED, answer} | {REUSED} | {STALE} | {GONE} | {MISSING}: a part is not there, or not any
-- more; UNSUPPORTED_LAYOUT, an error: another release laid out an entry that this step would change
-- Library: bytes, clock, contributions, models, parts, requests, versions
local slot = {
  model = KEYS[1], versions = KEYS[2], superseded = KEYS[3], contributions = KEYS[4], waiting = KEYS[5],
  expiry = KEYS[6], weights = ARGV[8], moments = ARGV[9], gradients = ARGV[10],
}
local requests_key, request_times_key = KEYS[7], KEYS[8]
local incarnation, base, head, request, remembered, named, entry = unpack(ARGV, 1, 7)
local remembered_ms, superseded_ms = tonumber(ARGV[11]), tonumber(ARGV[12])
local most_superseded_bytes, most_requests = tonumber(ARGV[13]), tonumber(ARGV[14])
local base_number, number = struct.unpack(VERSION_NAME, base), struct.unpack(VERSION_NAME, head)
local MOST_CLEARED <const> = 16 -- of a kind in one call, which else could take long
local LEAST_SUPERSEDED <const> = 4 -- versions that stay whatever their age and size
local now = now_ms()

-- Return the contributions' names; nil unless all of them wait; and the refusal of their entries.
local function read_names()
  local names = {}
  for at = 0, #named - 1, NAME_BYTES do
    local name = slice(named, at, NAME_BYTES)
    local contribution, refusal = read_contribution(slot, name)
    if refusal or not is_waiting(contribution) then return nil, refusal end
    names[#names + 1] = name
  end
  return names
end

-- Return the refusal of the entries of versions that this step may change.
local function check_versions()
  local numbers = redis.call('ZRANGE', slot.superseded, 0, MOST_CLEARED - 1)
  numbers[#numbers + 1] = base_number
  for _, each in ipairs(redis.call('HMGET', slot.versions, unpack(numbers))) do
    local refusal = check_version(each)
    if refusal then return refusal end
  end
end

-- Drop superseded versions, the oldest first, for which there is no time or room any more.
local function clear_superseded()
  for _ = 1, MOST_CLEARED do
    if redis.call('ZCARD', slot.superseded) <= LEAST_SUPERSEDED then break end
    local oldest, superseded_at = unpack(redis.call('ZRANGE', slot.superseded, 0, 0, 'WITHSCORES'))
    local is_kept = tonumber(superseded_at) + superseded_ms > now
    if is_kept and read_bytes(slot.model, SUPERSEDED_BYTES) <= most_superseded_bytes then break end
    local old_entry = redis.call('HGET', slot.versions, oldest)
    drop_all(weights_keys(slot.weights, oldest, old_entry))
    redis.call('HDEL', slot.versions, oldest)
    take_off_superseded(slot, oldest, old_entry)
  end
end

-- Forget requests, the oldest first, for which there is no time or room any more.
local function clear_requests()
  for _ = 1, MOST_CLEARED do
    local oldest, at = unpack(redis.call('ZRANGE', request_times_key, 0, 0, 'WITHSCORES'))
    if tonumber(at) + remembered_ms > now and redis.call('ZCARD', request_times_key) <= most_requests then break end
    redis.call('HDEL', requests_key, oldest)
    redis.call('ZREM', request_times_key, oldest)
  end
end

-- Forget consumed contributions whose time is over; those that wait are for record_contribution.lua.
local function clear_consumed()
  for _, name in ipairs(lapsed_names(slot.expiry, now)) do
    local contribution = redis.call('HGET', slot.contributions, name)
    if contribution and not is_waiting(contribution) then forget_contribution(slot, name) end
  end
end

-- Make the new version the head; the one before starts to age unless a checkpoint keeps it.
local function replace_head()
  local base_entry = redis.call('HGET', slot.versions, base_number)
  if base_entry and checkpoint_count(base_entry) == 0 then supersede(slot, base_number, base_entry, now) end
  redis.call('HSET', slot.versions, number, entry)
  redis.call('HSET', slot.model, HEAD, head)
end

if not is_incarnation(slot.model, incarnation) then return {'GONE'} end
local known = redis.call('HGET', requests_key, request)
if known then
  if request_content(known) ~= request_content(remembered) then return {'REUSED'} end
  return {'REPLAYED', request_answer(known)}
end
if read_model_head(slot.model) ~= base then return {'STALE'} end
local names, refusal = read_names()
refusal = refusal or names and check_versions()
if refusal then return refusal end
if not names then return {'STALE'} end
local parts, moment_parts = weights_keys(slot.weights, number, entry), moments_keys(slot.moments, number, entry)
if not persist_all(parts, moment_parts) then return {'MISSING'} end
consume_contributions(slot, names, now + remembered_ms)
replace_head()
clear_superseded()
remember_request(requests_key, request_times_key, request, remembered, now)
clear_requests()
clear_consumed()
return {'PUBLISHED'}
