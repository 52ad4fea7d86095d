#!lua flags=no-writes
-- Tell when a session of which only its marker is left had expired at the latest. Each chunk extends a
-- session, and only after a quarter of its time to live the marker as well, so it is not known better.
-- KEYS[1] marker
-- ARGV[1] time for which the marker outlives the session (ms)
-- Returns ms since 1970; 0: the marker has gone meanwhile
local ends = redis.call('PEXPIRETIME', KEYS[1])
if ends < 0 then return '0' end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
return string.format('%.0f', math.min(now, ends - tonumber(ARGV[1])))
