#!lua
-- Begin an epoch of a session: open it, open it again, or give a live one a new state; or go on with a live one.
-- The epoch is greater than any that the name ever had, by the marker and by the store's clock, so a
-- writer of an earlier epoch or of an earlier life is fenced off.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] what to do with a live session: fail | resume | reset; where there must be one: live (new epoch),
-- must_exist (as resume)
-- ARGV[2] expected epoch or 0  ARGV[3] expected chunk_seq or -1  ARGV[4] restored epoch or 0
-- ARGV[5] 16 bytes: 8 that name the request, 8 of its content; all zero: none
-- ARGV[6] ttl (ms)  ARGV[7] time for which the marker outlives the session (ms)
-- ARGV[8] head after touched: request, batch size, dtype, incarnation; then the tail
-- ARGV[9] slot 0: the state  ARGV[10] length of the tail
-- Returns {BEGUN | REPLAYED | REUSED | RESUMED | EXISTS | FENCED | GAP, epoch} or {ABSENT, marker or ''}; only
-- BEGUN changes anything. UNSUPPORTED_LAYOUT, an error: another release laid out one of the keys

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

local function whole(number) return string.format('%.0f', number) end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local mode, restored = ARGV[1], tonumber(ARGV[4])
local head = redis.call('GETRANGE', KEYS[1], 0, 79)
local marker = redis.call('GET', KEYS[2])
local unknown = head ~= '' and unknown_record(head)
if unknown then return unknown end
if marker and #marker ~= 9 then return redis.error_reply('UNSUPPORTED_LAYOUT marker ' .. #marker .. ' bytes') end
local last = marker and struct.unpack('>I8', marker) or 0
local ttl, touched = tonumber(ARGV[6]), now
if head ~= '' then
  local _, _, _, _, epoch, seq, live_ttl, live_touched = struct.unpack('>I1I1I2I4I8I8I8I8', head)
  if string.sub(head, 41, 48) == string.sub(ARGV[5], 1, 8) and ARGV[5] ~= string.rep('\0', 16) then
    if string.sub(head, 49, 56) ~= string.sub(ARGV[5], 9) then return {'REUSED', whole(epoch)} end
    if restored == 0 or restored == epoch then return {'REPLAYED', whole(epoch)} end
  end
  if mode == 'fail' then return {'EXISTS', whole(epoch)} end
  if mode == 'resume' or mode == 'must_exist' then return {'RESUMED', whole(epoch)} end
  local expected_epoch, expected_seq = tonumber(ARGV[2]), tonumber(ARGV[3])
  if expected_epoch > 0 and expected_epoch ~= epoch then return {'FENCED', whole(epoch)} end
  if expected_seq >= 0 and expected_seq ~= seq then return {'GAP', whole(seq)} end
  last = math.max(last, epoch)
  -- The tenant's list still has what it was told of the life before, so the next chunk sees when it is due.
  touched = ttl == live_ttl and live_touched or 0
elseif mode == 'live' or mode == 'must_exist' then
  return {'ABSENT', marker or ''}
end
local epoch = restored
if restored == 0 then
  epoch = math.max(last, now) + 1
elseif restored <= last or restored > now + 86400000 then
  return {'FENCED', whole(last)}
end
if head ~= '' then
  -- No Backward of an older epoch is to come but one that is sent again: its tapes wait no more, so that
  -- they take nobody's place, and none outlives the session.
  local index = redis.call('HGETALL', KEYS[3])
  unknown = unknown_tapes(index)
  if unknown then return unknown end
  for i = 1, #index, 2 do
    redis.call('HSET', KEYS[3], index[i], string.sub(index[i + 1], 1, 16) .. 'C' .. string.sub(index[i + 1], 18))
    redis.pcall('PEXPIRE', KEYS[3] .. index[i], ttl, 'LT')
  end
  redis.call('PEXPIRE', KEYS[3], ttl, 'LT')
end
local size = #ARGV[9] - 64
redis.call('SET', KEYS[1], struct.pack('>I1I1I2I4I8I8I8I8', 1, 2, tonumber(ARGV[10]), size, epoch, 0, ttl, touched)
  .. ARGV[8] .. ARGV[9] .. string.rep('\255', #ARGV[9]), 'PX', ttl)
-- Not shorter than it was: the writers of an earlier epoch may have been promised a longer life.
local stays = math.max(redis.call('PTTL', KEYS[2]), ttl + math.floor(ttl / 4) + tonumber(ARGV[7]))
redis.call('SET', KEYS[2], struct.pack('>I8', epoch) .. 'L', 'PX', whole(stays))
return {'BEGUN', whole(epoch)}
