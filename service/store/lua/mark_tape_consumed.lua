#!lua flags=allow-oom
-- Note that a tape's contribution was counted: it no longer waits, and is kept for a retry only.
-- KEYS[1] record  KEYS[2] tape index
-- ARGV[1] name of the tape  ARGV[2] token of its chunk
-- Returns OK or ABSENT; UNSUPPORTED_LAYOUT, an error: another release laid out the record or the entry

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

local head = redis.call('GETRANGE', KEYS[1], 0, 79)
local unknown = head ~= '' and unknown_record(head)
if unknown then return unknown end
local entry = redis.call('HGET', KEYS[2], ARGV[1])
if entry and #entry ~= 33 then return redis.error_reply('UNSUPPORTED_LAYOUT tape_entry ' .. #entry .. ' bytes') end
if not entry or string.sub(entry, 18, 33) ~= ARGV[2] then return 'ABSENT' end
redis.call('HSET', KEYS[2], ARGV[1], string.sub(entry, 1, 16) .. 'C' .. string.sub(entry, 18))
return 'OK'
