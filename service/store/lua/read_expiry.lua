#!lua flags=no-writes
-- Read when a session of which only its marker is left had expired at the latest. Each chunk extends a
-- session, but only after a quarter of its time to live the marker as well, so it is not known better.
-- KEYS[1] marker
-- ARGV[1] time for which the marker outlives the session (ms)
-- Returns ms since 1970; 0: the marker has gone meanwhile
-- Library: bytes, clock
local marker_key, marker_extra = KEYS[1], tonumber(ARGV[1])

local expires = redis.call('PEXPIRETIME', marker_key)
if expires < 0 then return '0' end
return decimal(math.min(now_ms(), expires - marker_extra))
