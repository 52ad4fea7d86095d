#!lua flags=no-writes
-- List a session's tapes that wait for their Backward, with where the session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- Returns {head and tail or '', marker or '', then for each tape its name: epoch (8) and seq (8), and its token (16)};
-- UNSUPPORTED_LAYOUT, an error: another release laid out the record or an entry

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

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local record = redis.call('GETRANGE', KEYS[1], 0, 207)
local index = redis.call('HGETALL', KEYS[3])
local unknown = record ~= '' and unknown_record(record) or unknown_tapes(index)
if unknown then return unknown end
if record ~= '' then record = string.sub(record, 1, 80 + struct.unpack('>I2', record, 3)) end
local answer = {record, redis.call('GET', KEYS[2]) or ''}
for i = 1, #index, 2 do
  local expires, _, state = struct.unpack('>I8I8c1', index[i + 1])
  if state == 'W' and expires > now then answer[#answer + 1] = index[i] .. string.sub(index[i + 1], 18, 33) end
end
return answer
