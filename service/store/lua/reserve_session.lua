#!lua
-- Note a session in its tenant's list, unless the tenant has as many as it may.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] session_id  ARGV[2] time to live (ms)  ARGV[3] most sessions
-- ARGV[4] GT: do not bring an entry's end forward, it may be a live session's; CH: set it
-- Returns the end that the entry now has, or FULL
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for _, lapsed in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], lapsed)
end
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCOUNT', KEYS[1], now, '+inf') >= tonumber(ARGV[3]) then
  return 'FULL'
end
redis.call('ZADD', KEYS[1], ARGV[4], now + tonumber(ARGV[2]), ARGV[1])
return redis.call('ZSCORE', KEYS[1], ARGV[1])
