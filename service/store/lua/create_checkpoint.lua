#!lua
-- Give a version a name under which it is kept.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints
-- ARGV[1] incarnation  ARGV[2] name  ARGV[3] version: number (8) and digest (16), or '' for the head
-- ARGV[4] most checkpoints
-- Returns {CREATED, checkpoint} | {KNOWN, checkpoint} | {EXISTS} | {VERSION_GONE} | {FORKED} | {QUOTA} | {GONE};
-- a checkpoint is number (8) digest (16) time of creation in ms (8). UNSUPPORTED_LAYOUT, an error: another release laid
-- out the checkpoint or the version's entry

-- The refusal of an entry of another length than ours; nil for our own, or for none.
local function unknown_entry(what, entry, size)
  if entry and #entry ~= size then return redis.error_reply('UNSUPPORTED_LAYOUT ' .. what .. ' ' .. #entry .. ' bytes') end
end

local model = redis.call('HMGET', KEYS[1], 'incarnation', 'head')
if model[1] ~= ARGV[1] then return {'GONE'} end
local known = redis.call('HGET', KEYS[4], ARGV[2])
local unknown = unknown_entry('checkpoint', known, 32)
if unknown then return unknown end
if known then
  if ARGV[3] == '' or string.sub(known, 1, 24) == ARGV[3] then return {'KNOWN', known} end
  return {'EXISTS'}
end
local version = ARGV[3] == '' and model[2] or ARGV[3]
local number = string.sub(version, 1, 8)
local entry = redis.call('HGET', KEYS[2], number)
if not entry then return {'VERSION_GONE'} end
unknown = unknown_entry('version_entry', entry, 30)
if unknown then return unknown end
if string.sub(entry, 1, 16) ~= string.sub(version, 9, 24) then return {'FORKED'} end
if redis.call('HLEN', KEYS[4]) >= tonumber(ARGV[4]) then return {'QUOTA'} end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local checkpoint = version .. struct.pack('>I8', now)
redis.call('HSET', KEYS[4], ARGV[2], checkpoint)
redis.call('HSET', KEYS[2], number, string.sub(entry, 1, 28) .. struct.pack('>I2', struct.unpack('>I2', entry, 29) + 1))
if redis.call('ZREM', KEYS[3], number) == 1 then
  redis.call('HINCRBY', KEYS[1], 'superseded', string.format('%.0f', -struct.unpack('>I8', entry, 17) - 4096))
end
return {'CREATED', checkpoint}
