#!lua flags=allow-oom
-- Let a session's time to live start again, as a chunk does.
-- KEYS[1] record  KEYS[2] marker
-- ARGV[1] epoch  ARGV[2] time for which the marker outlives the session (ms)
-- Returns OK; TOUCH: OK, and the session's entry in the tenant's list has to be extended; ABSENT; UNSUPPORTED_LAYOUT,
-- an error: another release laid out the record
-- Library: clock, sessions
local record_key, marker_key = KEYS[1], KEYS[2]
local expected_epoch, marker_extra = tonumber(ARGV[1]), tonumber(ARGV[2])

local head, refusal = read_head(record_key)
if refusal then return refusal end
if head == '' then return 'ABSENT' end
local _, _, _, _, epoch, _, ttl, listed_at = struct.unpack(HEAD_NUMBERS, head)
if epoch ~= expected_epoch then return 'ABSENT' end
redis.call('PEXPIRE', record_key, ttl)
redis.call('PEXPIRE', marker_key, marker_ttl(ttl, marker_extra), 'GT')
-- Only a chunk notes in the record that the list was updated: until one comes, the extension stays due.
return now_ms() - listed_at >= ttl / EXTENSIONS_PER_TTL and 'TOUCH' or 'OK'
