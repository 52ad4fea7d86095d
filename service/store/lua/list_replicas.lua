#!lua flags=no-writes
-- Read which replicas run, by name.
-- KEYS[1] replicas by the time at which they lapse
-- ARGV[1] what the keys of their records begin with  ARGV[2] most replicas
-- Returns {name, ms until it lapses, record, …}
-- Library: clock
local replicas_key, prefix, most = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()

local found = {}
local listed = redis.call('ZRANGEBYSCORE', replicas_key, now, '+inf', 'WITHSCORES', 'LIMIT', 0, most)
for i = 1, #listed, 2 do
  local record = redis.call('GET', prefix .. listed[i])
  if record then
    found[#found + 1], found[#found + 2], found[#found + 3] = listed[i], listed[i + 1] - now, record
  end
end
return found
