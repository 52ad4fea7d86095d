#!lua flags=no-writes
-- Read a tape, with where its session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index  KEYS[4] tape
-- ARGV[1] name of the tape: epoch (8) and seq (8)  ARGV[2] 1: read the tape; 0: its first byte, which names its layout
-- Returns {head and tail or '', marker or '', entry in the index or '' without a tape, tape or its first byte or ''};
-- UNSUPPORTED_LAYOUT, an error: another release laid out the record or the entry. The tape's layout is for the caller
-- Library: sessions, tapes
local record_key, marker_key, index_key, tape_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local name, last_byte = ARGV[1], ARGV[2] == '1' and -1 or 0

local head_and_tail, refusal = read_head_and_tail(record_key)
if refusal then return refusal end
local marker = redis.call('GET', marker_key) or ''
local entry, refused = read_tape_entry(index_key, name)
if refused then return refused end
if not entry or redis.call('EXISTS', tape_key) == 0 then return {head_and_tail, marker, '', ''} end
return {head_and_tail, marker, entry, redis.call('GETRANGE', tape_key, 0, last_byte)}
