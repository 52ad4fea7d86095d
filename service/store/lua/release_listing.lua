#!lua flags=allow-oom
-- Remove the entry in a tenant's list of an Open that was refused or of a session that was closed, unless
-- somebody else has reserved or used it since.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] session_id  ARGV[2] end that it had  ARGV[3] end of the session that lives, or 0: none
-- Returns OK or CHANGED
if redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then return 'CHANGED' end
if tonumber(ARGV[3]) == 0 then
  redis.call('ZREM', KEYS[1], ARGV[1])
else
  redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
end
return 'OK'
