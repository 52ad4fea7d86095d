#!lua flags=allow-oom
-- Note that a tape's contribution was counted: it no longer waits, and is kept for a retry only.
-- KEYS[1] tape index
-- ARGV[1] name of the tape  ARGV[2] token of its chunk
-- Returns OK or ABSENT
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry or string.sub(entry, 18, 33) ~= ARGV[2] then return 'ABSENT' end
redis.call('HSET', KEYS[1], ARGV[1], string.sub(entry, 1, 16) .. 'C' .. string.sub(entry, 18))
return 'OK'
