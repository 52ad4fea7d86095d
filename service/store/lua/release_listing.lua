#!lua flags=allow-oom
-- Remove the entry in a tenant's list of an Open that was refused or of a session that was closed, unless
-- somebody else has reserved or used it since.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] session_id  ARGV[2] end that the entry had  ARGV[3] end to restore, of the session that lives, or 0: none
-- Returns OK or CHANGED
local sessions_key, session_id, listed_end, live_end = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

if redis.call('ZSCORE', sessions_key, session_id) ~= listed_end then return 'CHANGED' end
if tonumber(live_end) == 0 then
  redis.call('ZREM', sessions_key, session_id)
else
  redis.call('ZADD', sessions_key, live_end, session_id)
end
return 'OK'
