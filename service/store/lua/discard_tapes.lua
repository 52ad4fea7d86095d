#!lua flags=allow-oom
-- Drop a session's tapes that wait for their Backward.
-- KEYS[1] tape index
-- ARGV[1] the epoch (8), or '': of any  ARGV[2] the chunk_seqs, 8 bytes each, or '': all
-- Returns their number
local dropped, index = 0, redis.call('HGETALL', KEYS[1])
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
    redis.call('HDEL', KEYS[1], index[i])
    redis.pcall('UNLINK', KEYS[1] .. index[i])
    dropped = dropped + 1
  end
end
return dropped
