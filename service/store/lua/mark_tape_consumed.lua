#!lua flags=allow-oom
-- Note that a tape's contribution was recorded: the tape no longer waits, and is kept for a retry only.
-- KEYS[1] record  KEYS[2] tape index
-- ARGV[1] name of the tape  ARGV[2] token of its chunk
-- Returns OK or ABSENT; UNSUPPORTED_LAYOUT, an error: another release laid out the record or the entry
-- Library: sessions, tapes
local record_key, index_key, name, chunk_token = KEYS[1], KEYS[2], ARGV[1], ARGV[2]

local _, refusal = read_head(record_key)
if refusal then return refusal end
local entry, refused = read_tape_entry(index_key, name)
if refused then return refused end
if not entry then return 'ABSENT' end
local _, _, _, token = struct.unpack(TAPE_ENTRY, entry)
if token ~= chunk_token then return 'ABSENT' end
consume_tape(index_key, name, entry)
return 'OK'
