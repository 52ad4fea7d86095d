#!lua flags=no-writes
-- Read a tape, with where its session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index  KEYS[4] tape
-- ARGV[1] name of the tape: epoch (8) and seq (8)  ARGV[2] 1: read the tape; 0: only its first byte, which names its layout
-- Returns {head and tail or '', marker or '', entry in the index or '' without a tape, tape or its first byte or ''};
-- UNSUPPORTED_LAYOUT, an error: another release laid out the record or the entry. The tape's layout is for the caller

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

local record = redis.call('GETRANGE', KEYS[1], 0, 207)
if record ~= '' then
  local unknown = unknown_record(record)
  if unknown then return unknown end
  record = string.sub(record, 1, 80 + struct.unpack('>I2', record, 3))
end
local marker, entry = redis.call('GET', KEYS[2]) or '', redis.call('HGET', KEYS[3], ARGV[1])
if entry and #entry ~= 33 then return redis.error_reply('UNSUPPORTED_LAYOUT tape_entry ' .. #entry .. ' bytes') end
if not entry or redis.call('EXISTS', KEYS[4]) == 0 then return {record, marker, '', ''} end
return {record, marker, entry, redis.call('GETRANGE', KEYS[4], 0, ARGV[2] == '1' and -1 or 0)}
