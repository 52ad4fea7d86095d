#!lua flags=allow-oom
-- Let a session's time to live start again, as a chunk does.
-- KEYS[1] record  KEYS[2] marker
-- ARGV[1] epoch  ARGV[2] time for which the marker outlives the session (ms)
-- Returns OK; TOUCH: OK, and a quarter of the ttl has passed since the tenant's list was told; ABSENT; UNSUPPORTED_LAYOUT,
-- an error: another release laid out the record

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

local head = redis.call('GETRANGE', KEYS[1], 0, 79)
if head == '' then return 'ABSENT' end
local unknown = unknown_record(head)
if unknown then return unknown end
local _, _, _, _, epoch, _, ttl, touched = struct.unpack('>I1I1I2I4I8I8I8I8', head)
if epoch ~= tonumber(ARGV[1]) then return 'ABSENT' end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl + math.floor(ttl / 4) + tonumber(ARGV[2]), 'GT')
-- That the list is told is noted by a chunk alone: until one comes, it is due each time.
return now - touched < ttl / 4 and 'OK' or 'TOUCH'
