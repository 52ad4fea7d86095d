#!lua flags=allow-oom
-- End a session: all its keys go but the marker, which tells for a while that it was closed.
-- The marker outlives the time for which the session would have lived on: who comes back within it and
-- finds nothing may take the session for lost, and begin it again.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] expected epoch or 0  ARGV[2] how much longer than that (ms)
-- Returns {CLOSED | ABSENT | FENCED, epoch, marker before}; UNSUPPORTED_LAYOUT, an error: what another release laid
-- out is for it to end, since only it knows which other keys there are

-- The refusal of a record that another release laid out, as its first byte says; nil for our own.
local function unknown_record(head)
  if string.byte(head) ~= 1 then return redis.error_reply('UNSUPPORTED_LAYOUT session layout ' .. string.byte(head)) end
  if #head < 80 then return redis.error_reply('UNSUPPORTED_LAYOUT session ' .. #head .. ' bytes') end
end

local function whole(number) return string.format('%.0f', number) end
local head = redis.call('GETRANGE', KEYS[1], 0, 79)
if head == '' then return {'ABSENT', '0', redis.call('GET', KEYS[2]) or ''} end
local unknown = unknown_record(head)
if unknown then return unknown end
local _, _, _, _, epoch, _, ttl = struct.unpack('>I1I1I2I4I8I8I8', head)
if tonumber(ARGV[1]) > 0 and tonumber(ARGV[1]) ~= epoch then return {'FENCED', whole(epoch), ''} end
for _, name in ipairs(redis.call('HKEYS', KEYS[3])) do redis.pcall('UNLINK', KEYS[3] .. name) end
redis.call('UNLINK', KEYS[1], KEYS[3])
local stays = math.max(redis.call('PTTL', KEYS[2]), ttl + math.floor(ttl / 4) + tonumber(ARGV[2]))
redis.call('SET', KEYS[2], struct.pack('>I8', epoch) .. 'C', 'PX', string.format('%.0f', stays))
return {'CLOSED', whole(epoch), ''}
