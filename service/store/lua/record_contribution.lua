#!lua
-- Count one contribution, once: a name that is known is not taken again, waiting or consumed.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] expiry
-- ARGV[1] incarnation  ARGV[2] name: session (16) epoch (8) seq (8)  ARGV[3] digest (16)  ARGV[4] gradient; '' when its parts
-- have been written under their names
-- ARGV[5] time to wait (ms)  ARGV[6] most waiting  ARGV[7] most bytes waiting  ARGV[8] most remembered
-- ARGV[9] prefix of gradients  ARGV[10] bytes of the gradient  ARGV[11] when its tape expires (ms)
-- Returns COUNTED | REPLAYED: and it waits | CONSUMED: counted before, and it waits no more | REUSED | GONE |
-- EXPIRED: the tape, before it was counted, so that its name may be forgotten | QUOTA | FULL | MISSING: a part is not there, or not any more;
-- UNSUPPORTED_LAYOUT, an error: another release laid out this contribution's entry, or one that is due to be forgotten

-- The refusal of a contribution's entry of another length than ours; nil for our own, or for none.
local function unknown_contribution(entry)
  if not entry or #entry == (string.sub(entry, 1, 1) == 'W' and 25 or 17) then return end
  return redis.error_reply('UNSUPPORTED_LAYOUT contribution ' .. #entry .. ' bytes')
end

if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 'GONE' end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
-- Remove a waiting gradient: one value, or parts of 4 MiB whose names carry its digest as well.
local function drop_gradient(name, entry)
  local parts = math.ceil(struct.unpack('>I8', entry, 18) / 4194304)
  if parts <= 1 then redis.pcall('UNLINK', ARGV[9] .. name) return end
  for part = 0, parts - 1 do
    redis.pcall('UNLINK', ARGV[9] .. name .. string.sub(entry, 2, 17) .. struct.pack('>I2', part))
  end
end
local function forget(name)
  local entry = redis.call('HGET', KEYS[2], name)
  if entry and string.sub(entry, 1, 1) == 'W' then
    redis.call('ZREM', KEYS[3], name)
    drop_gradient(name, entry)
    redis.call('HINCRBY', KEYS[1], 'waiting', string.format('%.0f', -struct.unpack('>I8', entry, 18)))
  end
  redis.call('HDEL', KEYS[2], name)
  redis.call('ZREM', KEYS[4], name)
end
local entry = redis.call('HGET', KEYS[2], ARGV[2])
local unknown = unknown_contribution(entry)
if unknown then return unknown end
if entry then
  if string.sub(entry, 2, 17) ~= ARGV[3] then return 'REUSED' end
  return string.sub(entry, 1, 1) == 'W' and 'REPLAYED' or 'CONSUMED'
end
if tonumber(ARGV[11]) <= now then return 'EXPIRED' end
local due = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 16)
for _, name in ipairs(due) do
  unknown = unknown_contribution(redis.call('HGET', KEYS[2], name))
  if unknown then return unknown end
end
for _, name in ipairs(due) do forget(name) end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[6]) then return 'QUOTA' end
local bytes = tonumber(ARGV[10])
if tonumber(redis.call('HGET', KEYS[1], 'waiting')) + bytes > tonumber(ARGV[7]) then return 'QUOTA' end
if redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[8]) then return 'FULL' end
if bytes <= 4194304 then
  redis.call('SET', ARGV[9] .. ARGV[2], ARGV[4])
else
  local parts = {}
  for part = 0, math.ceil(bytes / 4194304) - 1 do
    parts[part + 1] = ARGV[9] .. ARGV[2] .. ARGV[3] .. struct.pack('>I2', part)
    if redis.call('EXISTS', parts[part + 1]) == 0 then return 'MISSING' end
  end
  for _, key in ipairs(parts) do redis.call('PERSIST', key) end
end
redis.call('HSET', KEYS[2], ARGV[2], 'W' .. ARGV[3] .. struct.pack('>I8', bytes))
redis.call('ZADD', KEYS[3], 0, ARGV[2])
redis.call('ZADD', KEYS[4], now + tonumber(ARGV[5]), ARGV[2])
redis.call('HINCRBY', KEYS[1], 'waiting', ARGV[10])
return 'COUNTED'
