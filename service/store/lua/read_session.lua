#!lua flags=no-writes
-- Read a consistent snapshot of a session: its numbers, its last state, and the states around one chunk.
-- KEYS[1] record  KEYS[2] marker
-- ARGV[1] chunk_seq k of which states k-1 and k are wanted too; 0: none
-- Returns {head and tail, time at which it expires (ms), last slot, slot k-1, slot k}; {marker} without a record.
-- A slot that the ring no longer holds is ''. UNSUPPORTED_LAYOUT, an error: another release laid out the record
-- Library: bytes, sessions
local record_key, marker_key, wanted_seq = KEYS[1], KEYS[2], tonumber(ARGV[1])

local head_and_tail, refusal = read_head_and_tail(record_key)
if refusal then return refusal end
if head_and_tail == '' then return {redis.call('GET', marker_key) or ''} end
local _, slots, tail, size, _, last_seq = struct.unpack(HEAD_NUMBERS, head_and_tail)

local function read_slot(chunk_seq)
  if chunk_seq < 0 or chunk_seq > last_seq then return '' end
  local at = slot_at(tail, slots, size, chunk_seq)
  local slot = redis.call('GETRANGE', record_key, at, at + SLOT_HEAD_BYTES + size - 1)
  if slot == '' or struct.unpack(SLOT_CHUNK_SEQ, slot) ~= chunk_seq then return '' end
  return slot
end

local before, at = '', ''
if wanted_seq > 0 then before, at = read_slot(wanted_seq - 1), read_slot(wanted_seq) end
local expires = decimal(redis.call('PEXPIRETIME', record_key))
return {head_and_tail, expires, read_slot(last_seq), before, at}
