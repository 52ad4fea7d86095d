#!lua
-- Apply one chunk if the session still stands where its state was computed from.
-- Closes the race between reading h and writing the next h on two replicas. Anything but a match is
-- STALE: the caller reads again and decides from what is there.
-- KEYS[1] record  KEYS[2] marker; for a TRAIN chunk also  KEYS[3] tape index  KEYS[4] tape
-- ARGV[1] epoch (8)  acknowledged seq (8)  window (1)  marker's extra time in ms (8)  token of the base (16)
--         and the new slot's head: seq (8) digest (16) token (16) version number (8) version digest (16)
-- ARGV[2] h; for a TRAIN chunk also
-- ARGV[3] tape  ARGV[4] tape_ttl (ms)  ARGV[5] waiting tapes  ARGV[6] counted tapes  ARGV[7] bytes of counted tapes, at most
-- Returns OK; TOUCH: OK, and a quarter of the ttl has passed since the tenant's list was told; STALE; QUOTA
local record = redis.call('GETRANGE', KEYS[1], 0, 79)
if record == '' then return 'STALE' end
local layout, slots, tail, size, epoch, seq, ttl, touched = struct.unpack('>I1I1I2I4I8I8I8I8', record)
local want_epoch, acknowledged, window, extra = struct.unpack('>I8I8I1I8', ARGV[1])
local next_seq = struct.unpack('>I8', ARGV[1], 42)
if epoch ~= want_epoch or seq + 1 ~= next_seq or #ARGV[2] ~= size then return 'STALE' end
local first = 80 + tail
local function place(k, of) return first + (k % of) * (64 + size) end
local base = place(seq, slots)
if redis.call('GETRANGE', KEYS[1], base + 24, base + 39) ~= string.sub(ARGV[1], 26, 41) then return 'STALE' end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

if ARGV[3] then
  local waiting, counted, counted_bytes, oldest = 0, 0, 0, {}
  local index = redis.call('HGETALL', KEYS[3])
  for i = 1, #index, 2 do
    local expires, bytes, state = struct.unpack('>I8I8c1', index[i + 1])
    if expires <= now then redis.call('HDEL', KEYS[3], index[i])
    elseif state == 'W' then waiting = waiting + 1
    else
      counted, counted_bytes = counted + 1, counted_bytes + bytes
      oldest[counted] = {expires, index[i], bytes}
    end
  end
  if waiting >= tonumber(ARGV[5]) then return 'QUOTA' end
  table.sort(oldest, function(a, b) if a[1] ~= b[1] then return a[1] < b[1] end return a[2] < b[2] end)
  for i = 1, counted do
    if counted - i + 1 <= tonumber(ARGV[6]) and counted_bytes <= tonumber(ARGV[7]) then break end
    redis.call('HDEL', KEYS[3], oldest[i][2])
    redis.call('UNLINK', KEYS[3] .. oldest[i][2])
    counted_bytes = counted_bytes - oldest[i][3]
  end
  local name, tape_ttl = string.sub(ARGV[1], 1, 8) .. string.sub(ARGV[1], 42, 49), math.min(tonumber(ARGV[4]), ttl)
  redis.call('SET', KEYS[4], ARGV[3], 'PX', tape_ttl)
  redis.call('HSET', KEYS[3], name, struct.pack('>I8I8c1', now + tape_ttl, #ARGV[3], 'W') .. string.sub(ARGV[1], 66, 81))
  redis.call('PEXPIRE', KEYS[3], tape_ttl)
end

local lost = next_seq - slots
if slots <= window and lost >= 0 and lost >= acknowledged then
  -- A state that may still be asked for would be overwritten: lay the ring out anew with all its slots.
  local ring = {}
  for i = 0, window do ring[i + 1] = string.rep('\255', 64 + size) end
  for k = math.max(0, seq - slots + 1), seq do
    local at = place(k, slots)
    ring[k % (window + 1) + 1] = redis.call('GETRANGE', KEYS[1], at, at + 63 + size)
  end
  slots = window + 1
  redis.call('SET', KEYS[1], struct.pack('>I1I1', layout, slots) .. redis.call('GETRANGE', KEYS[1], 2, first - 1)
    .. table.concat(ring), 'KEEPTTL')
end
redis.call('SETRANGE', KEYS[1], place(next_seq, slots), string.sub(ARGV[1], 42) .. ARGV[2])
local due = now - touched >= ttl / 4
redis.call('SETRANGE', KEYS[1], 16, struct.pack('>I8I8I8', next_seq, ttl, due and now or touched))
redis.call('PEXPIRE', KEYS[1], ttl)
if not due then return 'OK' end
redis.call('PEXPIRE', KEYS[2], ttl + math.floor(ttl / 4) + extra)
return 'TOUCH'
