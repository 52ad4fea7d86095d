#!lua
-- Begin an epoch of a session: open it, open it again, or give a live one a new state.
-- The epoch is greater than any that the name ever had, by the marker and by the store's clock, so a
-- writer of an earlier epoch or of an earlier life is fenced off.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- ARGV[1] what to do with a live session: fail | resume | reset; live: there must be one
-- ARGV[2] expected epoch or 0  ARGV[3] expected chunk_seq or -1  ARGV[4] restored epoch or 0
-- ARGV[5] 16 bytes that name the request; all zero: none
-- ARGV[6] ttl (ms)  ARGV[7] time for which the marker outlives the session (ms)
-- ARGV[8] head after touched: request, batch size, dtype, incarnation; then the tail
-- ARGV[9] slot 0: the state  ARGV[10] length of the tail
-- Returns {BEGUN | REPLAYED | RESUMED | EXISTS | ABSENT | FENCED | GAP, epoch}
local function whole(number) return string.format('%.0f', number) end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local mode, restored = ARGV[1], tonumber(ARGV[4])
local head = redis.call('GETRANGE', KEYS[1], 0, 79)
local marker = redis.call('GET', KEYS[2])
local last = marker and struct.unpack('>I8', marker) or 0
local ttl = tonumber(ARGV[6])
if head ~= '' then
  local _, _, _, _, epoch, seq, live_ttl = struct.unpack('>I1I1I2I4I8I8I8', head)
  local named = string.sub(head, 41, 56) == ARGV[5] and ARGV[5] ~= string.rep('\0', 16)
  if named and (restored == 0 or restored == epoch) then return {'REPLAYED', whole(epoch)} end
  if mode == 'fail' then return {'EXISTS', whole(epoch)} end
  if mode == 'resume' then
    redis.call('PEXPIRE', KEYS[1], live_ttl)
    return {'RESUMED', whole(epoch)}
  end
  local expected_epoch, expected_seq = tonumber(ARGV[2]), tonumber(ARGV[3])
  if expected_epoch > 0 and expected_epoch ~= epoch then return {'FENCED', whole(epoch)} end
  if expected_seq >= 0 and expected_seq ~= seq then return {'GAP', whole(seq)} end
  last = math.max(last, epoch)
elseif mode == 'live' then
  return {'ABSENT', '0'}
end
local epoch = restored
if restored == 0 then
  epoch = math.max(last, now) + 1
elseif restored <= last or restored > now + 86400000 then
  return {'FENCED', whole(last)}
end
local size = #ARGV[9] - 64
redis.call('SET', KEYS[1], struct.pack('>I1I1I2I4I8I8I8I8', 1, 2, tonumber(ARGV[10]), size, epoch, 0, ttl, now)
  .. ARGV[8] .. ARGV[9] .. string.rep('\255', #ARGV[9]), 'PX', ttl)
redis.call('SET', KEYS[2], struct.pack('>I8', epoch) .. 'L', 'PX', ttl + math.floor(ttl / 4) + tonumber(ARGV[7]))
return {'BEGUN', whole(epoch)}
