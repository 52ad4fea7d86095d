#!lua
-- Apply chunks of different sessions, each if its session still stands where its state was computed from.
-- Closes the race between reading h and writing the next h on two replicas. Anything but a match is
-- STALE: the caller reads again and decides from what is there.
-- KEYS the sessions' records, one a chunk; a session's other keys are built from its record's. In a
-- cluster one call carries one chunk, and names its tape index, its tape and the tape's first name as
-- well, so that a slot on its move refuses it whole; elsewhere a call carries many, which saves most of
-- what it costs.
-- ARGV[1] window: the ring holds one state more  ARGV[2] marker's extra time (ms)  ARGV[3] tape_ttl (ms)
-- ARGV[4] waiting tapes  ARGV[5] counted tapes  ARGV[6] bytes of counted tapes, at most
-- ARGV[7] for each chunk: epoch (8) acknowledged seq (8) token of the base (16), the new slot's head: seq (8)
--         digest (16) token (16) version number (8) version digest (16), bytes of h (4), bytes of the tape
--         (4; 0: none), h. The tape was laid down under a name of its own right before: passed through the
--         script it would be copied several times; so it is only given its right name.
-- Returns for each chunk OK; TOUCH: OK, and a quarter of the ttl has passed since the tenant's list was told;
-- STALE; QUOTA: too many tapes wait; UNLAID: the tape is not under its first name; UNSUPPORTED_LAYOUT, an error in
-- this chunk's place: another release laid out the record or an entry of the tapes
local window, extra = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

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

-- Make room for a tape and take it over; nil, or why not.
local function keep_tape(index_key, name, token, staged_key, size, ttl)
  local waiting, counted, counted_bytes, oldest = 0, 0, 0, {}
  local index = redis.call('HGETALL', index_key)
  local unknown = unknown_tapes(index)
  if unknown then return unknown end
  for i = 1, #index, 2 do
    local expires, bytes, state = struct.unpack('>I8I8c1', index[i + 1])
    if expires <= now then redis.call('HDEL', index_key, index[i])
    elseif state == 'W' then waiting = waiting + 1
    else
      counted, counted_bytes = counted + 1, counted_bytes + bytes
      oldest[counted] = {expires, index[i], bytes}
    end
  end
  if waiting >= tonumber(ARGV[4]) then return 'QUOTA' end
  table.sort(oldest, function(a, b) if a[1] ~= b[1] then return a[1] < b[1] end return a[2] < b[2] end)
  for i = 1, counted do
    if counted - i + 1 <= tonumber(ARGV[5]) and counted_bytes <= tonumber(ARGV[6]) then break end
    redis.call('HDEL', index_key, oldest[i][2])
    redis.pcall('UNLINK', index_key .. oldest[i][2]) -- not here while its slot moves: it expires
    counted_bytes = counted_bytes - oldest[i][3]
  end
  local tape_ttl = math.min(tonumber(ARGV[3]), ttl)
  redis.call('RENAME', staged_key, index_key .. name)
  redis.call('PEXPIRE', index_key .. name, tape_ttl)
  redis.call('HSET', index_key, name, struct.pack('>I8I8c1', now + tape_ttl, size, 'W') .. token)
  redis.call('PEXPIRE', index_key, tape_ttl)
end

-- Lay a record's ring out anew with all its slots.
local function widen(key, layout, slots, first, size, seq)
  local ring = {}
  for i = 0, window do ring[i + 1] = string.rep('\255', 64 + size) end
  for k = math.max(0, seq - slots + 1), seq do
    local at = first + (k % slots) * (64 + size)
    ring[k % (window + 1) + 1] = redis.call('GETRANGE', key, at, at + 63 + size)
  end
  redis.call('SET', key, struct.pack('>I1I1', layout, window + 1) .. redis.call('GETRANGE', key, 2, first - 1)
    .. table.concat(ring), 'KEEPTTL')
end

local function commit(key, at, h, staged_key, tape_bytes)
  local record = redis.call('GETRANGE', key, 0, 79)
  if #record < 80 then return record == '' and 'STALE' or unknown_record(record) end
  local layout, slots, tail, size, epoch, seq, ttl, touched = struct.unpack('>I1I1I2I4I8I8I8I8', record)
  if layout ~= 1 then return unknown_record(record) end
  local want_epoch, acknowledged = struct.unpack('>I8I8', ARGV[7], at)
  local next_seq = struct.unpack('>I8', ARGV[7], at + 32)
  if epoch ~= want_epoch or seq + 1 ~= next_seq or #h ~= size then return 'STALE' end
  local first = 80 + tail
  local base = first + (seq % slots) * (64 + size)
  if redis.call('GETRANGE', key, base + 24, base + 39) ~= string.sub(ARGV[7], at + 16, at + 31) then return 'STALE' end
  if tape_bytes > 0 then
    if redis.call('STRLEN', staged_key) ~= tape_bytes then return 'UNLAID' end
    local name = string.sub(ARGV[7], at, at + 7) .. string.sub(ARGV[7], at + 32, at + 39)
    local refusal = keep_tape(key .. 't', name, string.sub(ARGV[7], at + 56, at + 71), staged_key, tape_bytes, ttl)
    if refusal then return refusal end
  end
  local lost = next_seq - slots
  if slots <= window and lost >= 0 and lost >= acknowledged then
    widen(key, layout, slots, first, size, seq) -- else a state that may be asked for would be overwritten
    slots = window + 1
  end
  redis.call('SETRANGE', key, first + (next_seq % slots) * (64 + size), string.sub(ARGV[7], at + 32, at + 95) .. h)
  local due = now - touched >= ttl / 4
  redis.call('SETRANGE', key, 16, struct.pack('>I8I8I8', next_seq, ttl, due and now or touched))
  redis.call('PEXPIRE', key, ttl)
  if not due then return 'OK' end
  redis.pcall('PEXPIRE', key .. 'e', ttl + math.floor(ttl / 4) + extra, 'GT') -- nor this; it has time to spare
  return 'TOUCH'
end

local answers, at = {}, 1
while at <= #ARGV[7] do
  local key = KEYS[#answers + 1]
  local h_bytes, tape_bytes = struct.unpack('>I4I4', ARGV[7], at + 96)
  local staged_key = key .. 'u' .. string.sub(ARGV[7], at + 56, at + 71)
  local answer = commit(key, at, string.sub(ARGV[7], at + 104, at + 103 + h_bytes), staged_key, tape_bytes)
  if tape_bytes > 0 and answer ~= 'OK' and answer ~= 'TOUCH' then redis.pcall('UNLINK', staged_key) end
  answers[#answers + 1] = answer
  at = at + 104 + h_bytes
end
return answers
