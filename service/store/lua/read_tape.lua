#!lua flags=no-writes
-- Read a tape, with where its session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index  KEYS[4] tape
-- ARGV[1] name of the tape: epoch (8) and seq (8)  ARGV[2] 1: read the tape; 0: only tell whether it is there
-- Returns {head and tail or '', marker or '', entry in the index or '' without a tape, tape or ''}
local record = redis.call('GETRANGE', KEYS[1], 0, 207)
if record ~= '' then record = string.sub(record, 1, 80 + struct.unpack('>I2', record, 3)) end
local marker, entry = redis.call('GET', KEYS[2]) or '', redis.call('HGET', KEYS[3], ARGV[1])
if not entry or redis.call('EXISTS', KEYS[4]) == 0 then return {record, marker, '', ''} end
return {record, marker, entry, ARGV[2] == '1' and redis.call('GET', KEYS[4]) or ''}
