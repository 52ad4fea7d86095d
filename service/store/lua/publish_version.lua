#!lua
-- Make a version whose weights and moments have been written under their names the model's head, and
-- consume the contributions that it was made from: one decision.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] contributions  KEYS[5] waiting  KEYS[6] expiry
-- KEYS[7] requests  KEYS[8] request times
-- ARGV[1] incarnation  ARGV[2] head that it was made from (24)  ARGV[3] new head: number (8) and digest (16)
-- ARGV[4] 16 bytes that name the request  ARGV[5] digest of its content (16) and its answer
-- ARGV[6] names of the contributions, 32 bytes each
-- ARGV[7] entry of the version: digest (16) bytes (8) parts (2) moments' parts (2) pins (2)
-- ARGV[8] prefix of weights  ARGV[9] prefix of moments  ARGV[10] prefix of gradients
-- ARGV[11] time for which a counted name is remembered (ms)  ARGV[12] … a superseded version is kept (ms)
-- ARGV[13] most bytes of superseded versions  ARGV[14] most requests remembered
-- Returns {PUBLISHED} | {REPLAYED, answer} | {REUSED} | {STALE} | {GONE} | {MISSING}: a part is not there, or not any more;
-- UNSUPPORTED_LAYOUT, an error: another release laid out an entry that this step would change

-- The refusal of an entry of another length than ours; nil for our own, or for none.
local function unknown_entry(what, entry, size)
  if entry and #entry ~= size then return redis.error_reply('UNSUPPORTED_LAYOUT ' .. what .. ' ' .. #entry .. ' bytes') end
end

-- The refusal of a contribution's entry of another length than ours; nil for our own, or for none.
local function unknown_contribution(entry)
  if not entry or #entry == (string.sub(entry, 1, 1) == 'W' and 25 or 17) then return end
  return redis.error_reply('UNSUPPORTED_LAYOUT contribution ' .. #entry .. ' bytes')
end

local model = redis.call('HMGET', KEYS[1], 'incarnation', 'head')
if model[1] ~= ARGV[1] then return {'GONE'} end
local known = redis.call('HGET', KEYS[7], ARGV[4])
if known then
  if string.sub(known, 1, 16) ~= string.sub(ARGV[5], 1, 16) then return {'REUSED'} end
  return {'REPLAYED', string.sub(known, 17)}
end
if model[2] ~= ARGV[2] then return {'STALE'} end
for at = 1, #ARGV[6], 32 do
  local entry = redis.call('HGET', KEYS[4], string.sub(ARGV[6], at, at + 31))
  local unknown = unknown_contribution(entry)
  if unknown then return unknown end
  if not entry or string.sub(entry, 1, 1) ~= 'W' then return {'STALE'} end
end
local ageing = redis.call('ZRANGE', KEYS[3], 0, 15)
ageing[#ageing + 1] = string.sub(ARGV[2], 1, 8)
for _, entry in ipairs(redis.call('HMGET', KEYS[2], unpack(ageing))) do
  local unknown = unknown_entry('version_entry', entry, 30)
  if unknown then return unknown end
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local charge = 4096 -- what a version costs beside its bytes, so that tiny ones are bounded in number too

-- Do a command with each part of a version's weights (25) or moments (27); return how many answered 1.
-- A slot may be on its move: a key to drop that is not here any more must not end the decision halfway.
local function blobs(command, number, entry, prefix, at)
  local found = 0
  for part = 0, struct.unpack('>I2', entry, at) - 1 do
    local key = prefix .. string.sub(entry, 1, 16) .. number .. struct.pack('>I2', part)
    if command == 'UNLINK' then redis.pcall(command, key) else found = found + redis.call(command, key) end
  end
  return found
end
local number = string.sub(ARGV[3], 1, 8)
local parts, moment_parts = struct.unpack('>I2I2', ARGV[7], 25)
-- All or nothing: a part made to stay beside one that has expired would stay for ever.
if blobs('EXISTS', number, ARGV[7], ARGV[8], 25) < parts or blobs('EXISTS', number, ARGV[7], ARGV[9], 27) < moment_parts then
  return {'MISSING'}
end
blobs('PERSIST', number, ARGV[7], ARGV[8], 25)
blobs('PERSIST', number, ARGV[7], ARGV[9], 27)

-- Remove a waiting gradient: one value, or parts of 4 MiB whose names carry its digest as well.
local function drop_gradient(name, entry)
  local parts = math.ceil(struct.unpack('>I8', entry, 18) / 4194304)
  if parts <= 1 then redis.pcall('UNLINK', ARGV[10] .. name) return end
  for part = 0, parts - 1 do
    redis.pcall('UNLINK', ARGV[10] .. name .. string.sub(entry, 2, 17) .. struct.pack('>I2', part))
  end
end
local freed = 0
for at = 1, #ARGV[6], 32 do
  local name = string.sub(ARGV[6], at, at + 31)
  local entry = redis.call('HGET', KEYS[4], name)
  freed = freed + struct.unpack('>I8', entry, 18)
  redis.call('HSET', KEYS[4], name, 'C' .. string.sub(entry, 2, 17))
  redis.call('ZREM', KEYS[5], name)
  redis.call('ZADD', KEYS[6], now + tonumber(ARGV[11]), name)
  drop_gradient(name, entry)
end
if freed > 0 then redis.call('HINCRBY', KEYS[1], 'waiting', string.format('%.0f', -freed)) end

local old_number = string.sub(ARGV[2], 1, 8)
local old = redis.call('HGET', KEYS[2], old_number)
if old and struct.unpack('>I2', old, 29) == 0 then
  blobs('UNLINK', old_number, old, ARGV[9], 27)
  redis.call('HSET', KEYS[2], old_number, string.sub(old, 1, 26) .. '\0\0\0\0')
  redis.call('ZADD', KEYS[3], now, old_number)
  redis.call('HINCRBY', KEYS[1], 'superseded', string.format('%.0f', struct.unpack('>I8', old, 17) + charge))
end
redis.call('HSET', KEYS[2], number, ARGV[7])
redis.call('HSET', KEYS[1], 'head', ARGV[3])

for _ = 1, 16 do
  if redis.call('ZCARD', KEYS[3]) <= 4 then break end
  local oldest = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  local bytes = tonumber(redis.call('HGET', KEYS[1], 'superseded'))
  if tonumber(oldest[2]) + tonumber(ARGV[12]) > now and bytes <= tonumber(ARGV[13]) then break end
  local entry = redis.call('HGET', KEYS[2], oldest[1])
  blobs('UNLINK', oldest[1], entry, ARGV[8], 25)
  redis.call('HDEL', KEYS[2], oldest[1])
  redis.call('ZREM', KEYS[3], oldest[1])
  redis.call('HINCRBY', KEYS[1], 'superseded', string.format('%.0f', -struct.unpack('>I8', entry, 17) - charge))
end

redis.call('HSET', KEYS[7], ARGV[4], ARGV[5])
redis.call('ZADD', KEYS[8], now, ARGV[4])
for _ = 1, 16 do
  local oldest = redis.call('ZRANGE', KEYS[8], 0, 0, 'WITHSCORES')
  if tonumber(oldest[2]) + tonumber(ARGV[11]) > now and redis.call('ZCARD', KEYS[8]) <= tonumber(ARGV[14]) then break end
  redis.call('HDEL', KEYS[7], oldest[1])
  redis.call('ZREM', KEYS[8], oldest[1])
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now, 'LIMIT', 0, 16)) do
  local entry = redis.call('HGET', KEYS[4], name)
  if entry and string.sub(entry, 1, 1) == 'C' then
    redis.call('HDEL', KEYS[4], name)
    redis.call('ZREM', KEYS[6], name)
  end
end
return {'PUBLISHED'}
