#!lua flags=allow-oom
-- End a session: all its keys go but the marker, which tells for a while that it was closed.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] expected epoch or 0  ARGV[2] time for which the marker stays (ms)
-- Returns {CLOSED | ABSENT | FENCED, epoch, marker before}
local function whole(number) return string.format('%.0f', number) end
local head = redis.call('GETRANGE', KEYS[1], 0, 79)
if head == '' then return {'ABSENT', '0', redis.call('GET', KEYS[2]) or ''} end
local _, _, _, _, epoch = struct.unpack('>I1I1I2I4I8', head)
if tonumber(ARGV[1]) > 0 and tonumber(ARGV[1]) ~= epoch then return {'FENCED', whole(epoch), ''} end
for _, name in ipairs(redis.call('HKEYS', KEYS[3])) do redis.pcall('UNLINK', KEYS[3] .. name) end
redis.call('UNLINK', KEYS[1], KEYS[3])
redis.call('SET', KEYS[2], struct.pack('>I8', epoch) .. 'C', 'PX', tonumber(ARGV[2]))
return {'CLOSED', whole(epoch), ''}
