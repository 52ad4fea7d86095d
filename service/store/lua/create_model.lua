#!lua
-- Create a model whose first version's weights and moments have been written under their names.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] requests  KEYS[4] request times
-- ARGV[1] incarnation  ARGV[2] specification  ARGV[3] head: number (8) and digest (16)
-- ARGV[4] 16 bytes that name the request, or ''  ARGV[5] digest of its content
-- ARGV[6] entry of the version: digest (16) bytes (8) parts (2) moments' parts (2) pins (2)
-- ARGV[7] prefix of weights  ARGV[8] prefix of moments
-- Returns CREATED | REPLAYED | EXISTS | REUSED | STALE: a part is not there, or not any more
if redis.call('EXISTS', KEYS[1]) == 1 then
  local known = ARGV[4] ~= '' and redis.call('HGET', KEYS[3], ARGV[4])
  if not known then return 'EXISTS' end
  return string.sub(known, 1, 16) == ARGV[5] and 'REPLAYED' or 'REUSED'
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local parts, moment_parts = struct.unpack('>I2I2', ARGV[6], 25)
local name = string.sub(ARGV[3], 9, 24) .. string.sub(ARGV[3], 1, 8)
local keys = {}
for part = 0, parts - 1 do keys[#keys + 1] = ARGV[7] .. name .. struct.pack('>I2', part) end
for part = 0, moment_parts - 1 do keys[#keys + 1] = ARGV[8] .. name .. struct.pack('>I2', part) end
for _, key in ipairs(keys) do
  if redis.call('EXISTS', key) == 0 then return 'STALE' end
end
for _, key in ipairs(keys) do redis.call('PERSIST', key) end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'spec', ARGV[2], 'head', ARGV[3],
  'created', string.format('%.0f', now), 'waiting', '0', 'superseded', '0')
redis.call('HSET', KEYS[2], string.sub(ARGV[3], 1, 8), ARGV[6])
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[3], ARGV[4], ARGV[5])
  redis.call('ZADD', KEYS[4], now, ARGV[4])
end
return 'CREATED'
