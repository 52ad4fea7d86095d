#!lua flags=allow-oom
-- Drop a session's tapes that wait for their Backward.
-- KEYS[1] record  KEYS[2] tape index
-- ARGV[1] the epoch (8), or '': of any  ARGV[2] the chunk_seqs, 8 bytes each, or '': all
-- Returns their number; UNSUPPORTED_LAYOUT, an error: another release laid out the record or an entry

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

-- The refusal of a list of tapes with an entry of another length than ours; nil for our own.
local function unknown_tapes(index)
  for i = 2, #index, 2 do
    if #index[i] ~= 33 then return redis.error_reply('UNSUPPORTED_LAYOUT tape_entry ' .. #index[i] .. ' bytes') end
  end
end

local head = redis.call('GETRANGE', KEYS[1], 0, 79)
local dropped, index = 0, redis.call('HGETALL', KEYS[2])
local unknown = head ~= '' and unknown_record(head) or unknown_tapes(index)
if unknown then return unknown end
local function named(name)
  if ARGV[1] ~= '' and string.sub(name, 1, 8) ~= ARGV[1] then return false end
  if ARGV[2] == '' then return true end
  for at = 1, #ARGV[2], 8 do
    if string.sub(ARGV[2], at, at + 7) == string.sub(name, 9) then return true end
  end
  return false
end
for i = 1, #index, 2 do
  if string.sub(index[i + 1], 17, 17) == 'W' and named(index[i]) then
    redis.call('HDEL', KEYS[2], index[i])
    redis.pcall('UNLINK', KEYS[2] .. index[i])
    dropped = dropped + 1
  end
end
return dropped
