#!lua
-- Begin an epoch of a session: open it, open it again, or give a live one a new state; or go on with a live one.
-- The epoch is greater than any that the name ever had, by the marker and by the store's clock, so a
-- writer of an earlier epoch or of an earlier session of that name is fenced off.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] what to do with a live session: fail | resume | reset; where there must be one: live (new epoch),
-- must_exist (as resume)
-- ARGV[2] expected epoch or 0  ARGV[3] expected chunk_seq or -1  ARGV[4] restored epoch or 0
-- ARGV[5] 16 bytes: 8 that name the request, 8 of its content; all zero: none
-- ARGV[6] ttl (ms)  ARGV[7] time for which the marker outlives the session (ms)
-- ARGV[8] rest of the head: request, batch size, dtype, incarnation; then the tail
-- ARGV[9] slot 0: the state  ARGV[10] length of the tail
-- Returns {BEGUN | REPLAYED | REUSED | RESUMED | EXISTS | FENCED | GAP, epoch} or {ABSENT, marker or ''}; only
-- BEGUN changes anything, and then come the names (16 each) of tapes that wait no more. UNSUPPORTED_LAYOUT, an error:
-- another release laid out one of the keys
-- Library: bytes, clock, markers, sessions, tapes
local record_key, marker_key, index_key = KEYS[1], KEYS[2], KEYS[3]
local mode, expected_epoch, expected_seq, restored = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local request, ttl, marker_extra = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local rest_of_head, first_slot, tail = ARGV[8], ARGV[9], tonumber(ARGV[10])
local REQUEST_AT <const> = 40
local REQUEST_HALF_BYTES <const> = 8
local MOST_AHEAD_MS <const> = 86400000 -- how far ahead of the store's clock a restored epoch may be
local now = now_ms()

-- Return the answer to a request that began the live epoch; nil if this one did not.
local function answer_again(head, epoch)
  local began = slice(head, REQUEST_AT, 2 * REQUEST_HALF_BYTES)
  local is_named = request ~= string.rep('\0', #request)
  if not is_named or slice(began, 0, REQUEST_HALF_BYTES) ~= slice(request, 0, REQUEST_HALF_BYTES) then return end
  if began ~= request then return {'REUSED', decimal(epoch)} end
  if restored == 0 or restored == epoch then return {'REPLAYED', decimal(epoch)} end
end

-- Return the answer where a live session is left as it is; nil: it gets a new epoch.
local function answer_as_it_is(epoch, chunk_seq)
  if mode == 'fail' then return {'EXISTS', decimal(epoch)} end
  if mode == 'resume' or mode == 'must_exist' then return {'RESUMED', decimal(epoch)} end
  if expected_epoch > 0 and expected_epoch ~= epoch then return {'FENCED', decimal(epoch)} end
  if expected_seq >= 0 and expected_seq ~= chunk_seq then return {'GAP', decimal(chunk_seq)} end
end

-- Return an epoch after the last one; nil if the one to be restored is not.
local function next_epoch(last)
  if restored == 0 then return math.max(last, now) + 1 end
  if restored > last and restored <= now + MOST_AHEAD_MS then return restored end
end

-- Mark the tapes of older epochs consumed, and let none outlive the session. The only Backward that can still come for
-- one of them is one that is sent again, so they need not count towards the quota of waiting tapes. Return their names.
local function consume_tapes(index)
  local names = {}
  for i = 1, #index, 2 do
    consume_tape(index_key, index[i], index[i + 1])
    redis.pcall('PEXPIRE', index_key .. index[i], ttl, 'LT')
    names[#names + 1] = index[i]
  end
  redis.call('PEXPIRE', index_key, ttl, 'LT')
  return table.concat(names)
end

-- Write the record, with a ring of two slots; it grows when a client needs more of its states kept.
local function write_record(epoch, listed_at)
  local size = #first_slot - SLOT_HEAD_BYTES
  local numbers = struct.pack(HEAD_NUMBERS, RECORD_LAYOUT, 2, tail, size, epoch, 0, ttl, listed_at)
  redis.call('SET', record_key, numbers .. rest_of_head .. first_slot .. string.rep(EMPTY, #first_slot), 'PX', ttl)
end

local head, refusal = read_head(record_key)
if refusal then return refusal end
local marker, last = redis.call('GET', marker_key), 0
refusal = check_marker(marker)
if refusal then return refusal end
if marker then last = struct.unpack(MARKER_EPOCH, marker) end
local listed_at = now
if head ~= '' then
  local _, _, _, _, epoch, chunk_seq, live_ttl, live_listed_at = struct.unpack(HEAD_NUMBERS, head)
  local answer = answer_again(head, epoch) or answer_as_it_is(epoch, chunk_seq)
  if answer then return answer end
  last = math.max(last, epoch)
  -- The tenant's list still has the end that the old ttl gave: 0 makes the next chunk correct it.
  listed_at = ttl == live_ttl and live_listed_at or 0
elseif mode == 'live' or mode == 'must_exist' then
  return {'ABSENT', marker or ''}
end
local epoch = next_epoch(last)
if not epoch then return {'FENCED', decimal(last)} end
local tapes = ''
if head ~= '' then
  local index
  index, refusal = read_tapes(index_key)
  if refusal then return refusal end
  tapes = consume_tapes(index)
end
write_record(epoch, listed_at)
write_marker(marker_key, epoch, MARKER_LIVE, ttl, marker_extra)
return {'BEGUN', decimal(epoch), tapes}
