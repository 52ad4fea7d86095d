#!lua flags=no-writes
-- List a session's tapes that wait for their Backward, with where the session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- Returns {head and tail or '', marker or '', then for each tape its name: epoch (8) and seq (8), and its token (16)}
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local record = redis.call('GETRANGE', KEYS[1], 0, 207)
if record ~= '' then record = string.sub(record, 1, 80 + struct.unpack('>I2', record, 3)) end
local answer = {record, redis.call('GET', KEYS[2]) or ''}
local index = redis.call('HGETALL', KEYS[3])
for i = 1, #index, 2 do
  local expires, _, state = struct.unpack('>I8I8c1', index[i + 1])
  if state == 'W' and expires > now then answer[#answer + 1] = index[i] .. string.sub(index[i + 1], 18, 33) end
end
return answer
