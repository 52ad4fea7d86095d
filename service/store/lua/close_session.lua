#!lua flags=allow-oom
-- End a session: all its keys go but the marker, which says for a while that it was closed.
-- The marker outlives the time at which the session would have expired: who comes back within it and
-- finds nothing may take the session for lost, and begin it again.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] expected epoch or 0  ARGV[2] time for which the marker outlives the session (ms)
-- Returns {ABSENT | FENCED, epoch, marker before} or {CLOSED, epoch, names of its tapes (16 each)}; UNSUPPORTED_LAYOUT,
-- an error: only the release that laid out the record knows which other keys belong to the session
-- Library: bytes, markers, sessions
local record_key, marker_key, index_key = KEYS[1], KEYS[2], KEYS[3]
local expected_epoch, marker_extra = tonumber(ARGV[1]), tonumber(ARGV[2])

local head, refusal = read_head(record_key)
if refusal then return refusal end
if head == '' then return {'ABSENT', '0', redis.call('GET', marker_key) or ''} end
local _, _, _, _, epoch, _, ttl = struct.unpack(HEAD_NUMBERS, head)
if expected_epoch > 0 and expected_epoch ~= epoch then return {'FENCED', decimal(epoch), ''} end
local tapes = redis.call('HKEYS', index_key)
for _, name in ipairs(tapes) do redis.pcall('UNLINK', index_key .. name) end
redis.call('UNLINK', record_key, index_key)
write_marker(marker_key, epoch, MARKER_CLOSED, ttl, marker_extra)
return {'CLOSED', decimal(epoch), table.concat(tapes)}
