#!lua flags=no-writes
-- Read a session in one look: its numbers, its last state, and the states around one chunk.
-- KEYS[1] record  KEYS[2] marker
-- ARGV[1] chunk_seq k of which states k-1 and k are wanted too; 0: none
-- Returns {head and tail, time at which it expires (ms), last slot, slot k-1, slot k}; {marker} when there is no record.
-- A slot that the ring no longer holds is ''. UNSUPPORTED_LAYOUT, an error: another release laid out the record

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

local record = redis.call('GETRANGE', KEYS[1], 0, 207)
if record == '' then return {redis.call('GET', KEYS[2]) or ''} end
local unknown = unknown_record(record)
if unknown then return unknown end
local _, slots, tail, size, _, seq = struct.unpack('>I1I1I2I4I8I8', record)
local function slot(k)
  if k < 0 or k > seq then return '' end
  local at = 80 + tail + (k % slots) * (64 + size)
  local found = redis.call('GETRANGE', KEYS[1], at, at + 63 + size)
  if found == '' or struct.unpack('>I8', found) ~= k then return '' end
  return found
end
local k = tonumber(ARGV[1])
local before, at = '', ''
if k > 0 then before, at = slot(k - 1), slot(k) end
return {string.sub(record, 1, 80 + tail), string.format('%.0f', redis.call('PEXPIRETIME', KEYS[1])), slot(seq), before, at}
