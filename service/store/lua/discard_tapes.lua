#!lua flags=allow-oom
-- Drop a session's tapes that wait for their Backward.
-- KEYS[1] record  KEYS[2] tape index
-- ARGV[1] the epoch (8), or '': of any  ARGV[2] the chunk_seqs, 8 bytes each, or '': all
-- Returns their names (16 each); UNSUPPORTED_LAYOUT, an error: another release laid out the record or an entry
-- Library: bytes, sessions, tapes
local record_key, index_key, epoch, chunk_seqs = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local NUMBER_BYTES <const> = 8

-- Return whether the tape of this name, epoch and chunk_seq, is one that the caller means.
local function is_meant(name)
  if epoch ~= '' and slice(name, 0, NUMBER_BYTES) ~= epoch then return false end
  if chunk_seqs == '' then return true end
  for at = 0, #chunk_seqs - 1, NUMBER_BYTES do
    if slice(chunk_seqs, at, NUMBER_BYTES) == slice(name, NUMBER_BYTES, NUMBER_BYTES) then return true end
  end
  return false
end

local _, refusal = read_head(record_key)
if refusal then return refusal end
local index, refused = read_tapes(index_key)
if refused then return refused end
local dropped = {}
for i = 1, #index, 2 do
  local _, _, state = struct.unpack(TAPE_ENTRY, index[i + 1])
  if state == TAPE_WAITING and is_meant(index[i]) then
    redis.call('HDEL', index_key, index[i])
    redis.pcall('UNLINK', index_key .. index[i])
    dropped[#dropped + 1] = index[i]
  end
end
return table.concat(dropped)
