#!lua
-- List a session among its tenant's, unless the tenant has as many as it may.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] session_id  ARGV[2] time to live (ms)  ARGV[3] most sessions
-- ARGV[4] GT: do not bring an entry's end forward, it may be a live session's; CH: set it
-- Returns the end that the entry now has, or FULL
-- Library: clock, lapsed
local sessions_key, session_id, ttl, most, condition = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now = now_ms()

forget_lapsed(sessions_key, now)
local is_listed = redis.call('ZSCORE', sessions_key, session_id)
if not is_listed and redis.call('ZCOUNT', sessions_key, now, '+inf') >= most then return 'FULL' end
redis.call('ZADD', sessions_key, condition, now + ttl, session_id)
return redis.call('ZSCORE', sessions_key, session_id)
