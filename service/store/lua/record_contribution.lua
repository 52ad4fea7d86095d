#!lua
-- Record one contribution, once: a name that is known is not taken again, waiting or consumed.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] expiry
-- ARGV[1] incarnation  ARGV[2] name: session (16) epoch (8) seq (8)  ARGV[3] digest (16)
-- ARGV[4] gradient; '' when its parts have been written under their names
-- ARGV[5] time to wait (ms)  ARGV[6] most waiting  ARGV[7] most bytes waiting  ARGV[8] most remembered
-- ARGV[9] prefix of gradients  ARGV[10] bytes of the gradient  ARGV[11] when its tape expires (ms)
-- Returns RECORDED: it is recorded now | REPLAYED: it was before, and waits | CONSUMED: it was, and waits no more |
-- REUSED | GONE | EXPIRED: the tape, before it was recorded, so that its name may be forgotten |
-- QUOTA | FULL | MISSING: a part is not there, or not any more; UNSUPPORTED_LAYOUT, an error: another release laid out
-- this contribution's entry, or one that is due to be forgotten
-- Library: clock, contributions, models
local slot = {model = KEYS[1], contributions = KEYS[2], waiting = KEYS[3], expiry = KEYS[4], gradients = ARGV[9]}
local incarnation, name, digest, gradient, wait_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local most_waiting, most_bytes, most_remembered = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local bytes, tape_expires = tonumber(ARGV[10]), tonumber(ARGV[11])
local now = now_ms()

-- Return names whose time is over; and the refusal of their entries.
local function read_lapsed()
  local names = lapsed_names(slot.expiry, now)
  for _, lapsed in ipairs(names) do
    local _, refusal = read_contribution(slot, lapsed)
    if refusal then return names, refusal end
  end
  return names
end

-- Forget a contribution; one that nobody has consumed goes with its gradient.
local function forget(lapsed)
  local entry = redis.call('HGET', slot.contributions, lapsed)
  if is_waiting(entry) then
    redis.call('ZREM', slot.waiting, lapsed)
    add_bytes(slot.model, WAITING_BYTES, -drop_gradient(slot, lapsed, entry))
  end
  forget_contribution(slot, lapsed)
end

-- Return why no more contributions can be recorded; nil while there is room.
local function refuse_for_want_of_room()
  if redis.call('ZCARD', slot.waiting) >= most_waiting then return 'QUOTA' end
  if read_bytes(slot.model, WAITING_BYTES) + bytes > most_bytes then return 'QUOTA' end
  if redis.call('HLEN', slot.contributions) >= most_remembered then return 'FULL' end
end

-- Write the gradient, or let its parts stay; return whether it is there.
local function keep_gradient()
  local keys = gradient_keys(slot, name, digest, bytes)
  if bytes > PART_BYTES then return persist_all(keys) end
  redis.call('SET', keys[1], gradient)
  return true
end

if not is_incarnation(slot.model, incarnation) then return 'GONE' end
local known, refusal = read_contribution(slot, name)
if refusal then return refusal end
if known then
  if contribution_digest(known) ~= digest then return 'REUSED' end
  return is_waiting(known) and 'REPLAYED' or 'CONSUMED'
end
if tape_expires <= now then return 'EXPIRED' end
local lapsed, refused = read_lapsed()
if refused then return refused end
for _, each in ipairs(lapsed) do forget(each) end
local no_room = refuse_for_want_of_room()
if no_room then return no_room end
if not keep_gradient() then return 'MISSING' end
redis.call('HSET', slot.contributions, name, struct.pack(WAITING_ENTRY, WAITING, digest, bytes))
redis.call('ZADD', slot.waiting, 0, name)
redis.call('ZADD', slot.expiry, now + wait_ms, name)
add_bytes(slot.model, WAITING_BYTES, bytes)
return 'RECORDED'
