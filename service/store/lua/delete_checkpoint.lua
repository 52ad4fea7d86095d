#!lua flags=allow-oom
-- Take a checkpoint's name away; its version then ages like any superseded one.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints
-- ARGV[1] incarnation  ARGV[2] name  ARGV[3] prefix of moments
-- Returns DELETED | ABSENT | GONE; UNSUPPORTED_LAYOUT, an error: another release laid out the checkpoint or the
-- version's entry

-- The refusal of an entry of another length than ours; nil for our own, or for none.
local function unknown_entry(what, entry, size)
  if entry and #entry ~= size then return redis.error_reply('UNSUPPORTED_LAYOUT ' .. what .. ' ' .. #entry .. ' bytes') end
end

local model = redis.call('HMGET', KEYS[1], 'incarnation', 'head')
if model[1] ~= ARGV[1] then return 'GONE' end
local known = redis.call('HGET', KEYS[4], ARGV[2])
if not known then return 'ABSENT' end
local number = string.sub(known, 1, 8)
local entry = redis.call('HGET', KEYS[2], number)
local unknown = unknown_entry('checkpoint', known, 32) or unknown_entry('version_entry', entry, 30)
if unknown then return unknown end
redis.call('HDEL', KEYS[4], ARGV[2])
local pins = struct.unpack('>I2', entry, 29) - 1
if pins > 0 or string.sub(model[2], 1, 8) == number then
  redis.call('HSET', KEYS[2], number, string.sub(entry, 1, 28) .. struct.pack('>I2', pins))
  return 'DELETED'
end
for part = 0, struct.unpack('>I2', entry, 27) - 1 do
  redis.pcall('UNLINK', ARGV[3] .. string.sub(entry, 1, 16) .. number .. struct.pack('>I2', part))
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', KEYS[2], number, string.sub(entry, 1, 26) .. '\0\0\0\0')
redis.call('ZADD', KEYS[3], now, number)
redis.call('HINCRBY', KEYS[1], 'superseded', string.format('%.0f', struct.unpack('>I8', entry, 17) + 4096))
return 'DELETED'
