#!lua
-- Apply chunks of different sessions, each if its session still stands where its state was computed from.
-- Closes the race between reading a state and writing the next one on two replicas. Anything but a match is
-- STALE: the caller reads again and decides from what is there.
-- KEYS the sessions' records, one a chunk; a session's other keys are built from its record's. In a
-- cluster one call carries one chunk, and names its tape index, its tape and the staged tape as
-- well, so that a slot on its move refuses it whole; elsewhere a call carries many, which saves most of
-- what it costs.
-- ARGV[1] window: the ring holds one state more  ARGV[2] time for which the marker outlives the session (ms)
-- ARGV[3] tape_ttl (ms)
-- ARGV[4] for each chunk: epoch (8) acknowledged seq (8) token of the base (16) bytes of the state (4) bytes of the
--         tape (4; 0: none), then the new slot and, with a tape, what its session may keep: waiting tapes (4),
--         consumed tapes (4) and their bytes (8). The tape was staged under a key of its own right before: passed
--         through the script it would be copied several times; so it is only renamed.
-- Returns for each chunk OK; TOUCH: OK, and the session's entry in the tenant's list has to be extended; STALE;
-- QUOTA: too many tapes wait, which is decided before the tape is looked for; UNSTAGED: it is not under its staged
-- key; UNSUPPORTED_LAYOUT, an error in this chunk's place: another release laid out the record or an entry of the tapes
-- Library: clock, sessions, tapes
-- Arguments are read where they are used, since a run that has no tape is to make no variables for one.
local window, chunks = tonumber(ARGV[1]), ARGV[4]
local now = now_ms()
-- Of a chunk: epoch, acknowledged seq, token of the base, bytes of the state, of the tape; then its slot: chunk_seq.
local CHUNK <const> = '>I8I8c16I4I4I8'
local CHUNK_BYTES <const> = 40 -- before the slot
local TAPE_LIMITS <const> = '>I4I4I8' -- waiting tapes, consumed tapes, bytes of these: the most that a session keeps
local TAPE_LIMITS_BYTES <const> = 16
local TAPE_NAME <const> = '>I8I8' -- epoch, chunk_seq
-- What a session's other keys add to its record's.
local MARKER <const> = 'e'
local TAPE_INDEX <const> = 't'
local STAGED_TAPE <const> = 'u'

-- Drop the entries of tapes that have expired. Return how many tapes wait, the consumed ones, and the bytes of these.
local function survey_tapes(index_key, index)
  local waiting, consumed, consumed_bytes = 0, {}, 0
  for i = 1, #index, 2 do
    local expires, bytes, state = struct.unpack(TAPE_ENTRY, index[i + 1])
    if expires <= now then
      redis.call('HDEL', index_key, index[i])
    elseif state == TAPE_WAITING then
      waiting = waiting + 1
    else
      consumed[#consumed + 1] = {expires = expires, name = index[i], bytes = bytes}
      consumed_bytes = consumed_bytes + bytes
    end
  end
  return waiting, consumed, consumed_bytes
end

-- Drop the oldest of the consumed tapes until no more are left than may be.
local function evict_tapes(index_key, consumed, consumed_bytes, most, most_bytes)
  table.sort(consumed, function(one, other)
    if one.expires ~= other.expires then return one.expires < other.expires end
    return one.name < other.name
  end)
  for i, tape in ipairs(consumed) do
    if #consumed - i < most and consumed_bytes <= most_bytes then break end
    redis.call('HDEL', index_key, tape.name)
    redis.pcall('UNLINK', index_key .. tape.name) -- it is elsewhere while its slot moves: then it expires
    consumed_bytes = consumed_bytes - tape.bytes
  end
end

-- Return the token in a chunk's slot, and the key of its staged tape.
local function token_and_staged_key(chunk)
  local token = struct.unpack(TOKEN, chunk.slot, SLOT_TOKEN_AT + 1)
  return token, chunk.key .. STAGED_TAPE .. token
end

-- Make the staged tape one of the session's that wait; return why not.
local function adopt_tape(chunk, ttl)
  local index_key = chunk.key .. TAPE_INDEX
  local index, refusal = read_tapes(index_key)
  if refusal then return refusal end
  local waiting, consumed, consumed_bytes = survey_tapes(index_key, index)
  local most_waiting, most_consumed, most_bytes = struct.unpack(TAPE_LIMITS, chunk.tape_limits)
  if waiting >= most_waiting then return 'QUOTA' end
  local token, staged_key = token_and_staged_key(chunk)
  if redis.call('STRLEN', staged_key) ~= chunk.tape_bytes then return 'UNSTAGED' end
  evict_tapes(index_key, consumed, consumed_bytes, most_consumed, most_bytes)
  local name, lasts = struct.pack(TAPE_NAME, chunk.epoch, chunk.seq), math.min(tonumber(ARGV[3]), ttl)
  redis.call('RENAME', staged_key, index_key .. name)
  redis.call('PEXPIRE', index_key .. name, lasts)
  redis.call('HSET', index_key, name, struct.pack(TAPE_ENTRY, now + lasts, chunk.tape_bytes, TAPE_WAITING, token))
  redis.call('PEXPIRE', index_key, lasts)
end

-- Rewrite a record with as many slots as it may have.
local function widen(key, slots, tail, size, last_seq)
  local ring = {}
  for i = 0, window do ring[i + 1] = string.rep(EMPTY, SLOT_HEAD_BYTES + size) end
  for chunk_seq = math.max(0, last_seq - slots + 1), last_seq do
    local at = slot_at(tail, slots, size, chunk_seq)
    ring[chunk_seq % (window + 1) + 1] = redis.call('GETRANGE', key, at, at + SLOT_HEAD_BYTES + size - 1)
  end
  local head_and_tail = redis.call('GETRANGE', key, 0, HEAD_BYTES + tail - 1)
  redis.call('SET', key, head_and_tail .. table.concat(ring), 'KEEPTTL')
  redis.call('SETRANGE', key, SLOTS_AT, string.char(window + 1))
end

local function commit(chunk)
  local key, head, refusal = chunk.key, read_head(chunk.key)
  if refusal then return refusal end
  if head == '' then return 'STALE' end
  local _, slots, tail, size, epoch, last_seq, ttl, listed_at = struct.unpack(HEAD_NUMBERS, head)
  local is_next = epoch == chunk.epoch and last_seq + 1 == chunk.seq and #chunk.slot == SLOT_HEAD_BYTES + size
  if not is_next then return 'STALE' end
  local base_at = slot_at(tail, slots, size, last_seq) + SLOT_TOKEN_AT
  if redis.call('GETRANGE', key, base_at, base_at + TOKEN_BYTES - 1) ~= chunk.base_token then return 'STALE' end
  refusal = chunk.tape_bytes > 0 and adopt_tape(chunk, ttl)
  if refusal then return refusal end
  local lost = chunk.seq - slots
  if slots <= window and lost >= math.max(0, chunk.acknowledged) then -- a client may still ask for what would be lost
    widen(key, slots, tail, size, last_seq)
    slots = window + 1
  end
  redis.call('SETRANGE', key, slot_at(tail, slots, size, chunk.seq), chunk.slot)
  local is_due = now - listed_at >= ttl / EXTENSIONS_PER_TTL
  redis.call('SETRANGE', key, CHUNK_SEQ_AT, struct.pack(AFTER_CHUNK, chunk.seq, ttl, is_due and now or listed_at))
  redis.call('PEXPIRE', key, ttl)
  if not is_due then return 'OK' end
  redis.pcall('PEXPIRE', key .. MARKER, marker_ttl(ttl, tonumber(ARGV[2])), 'GT') -- elsewhere too; it has time to spare
  return 'TOUCH'
end

local answers, position = {}, 1
while position <= #chunks do
  local epoch, acknowledged, base_token, state_bytes, tape_bytes, seq = struct.unpack(CHUNK, chunks, position)
  local slot_from = position + CHUNK_BYTES
  position = slot_from + SLOT_HEAD_BYTES + state_bytes
  local chunk = {
    key = KEYS[#answers + 1], epoch = epoch, acknowledged = acknowledged, base_token = base_token, seq = seq,
    slot = string.sub(chunks, slot_from, position - 1), tape_bytes = tape_bytes,
  }
  if tape_bytes > 0 then
    chunk.tape_limits = string.sub(chunks, position, position + TAPE_LIMITS_BYTES - 1)
    position = position + TAPE_LIMITS_BYTES
  end
  local answer = commit(chunk)
  local is_applied = answer == 'OK' or answer == 'TOUCH'
  if tape_bytes > 0 and not is_applied then redis.pcall('UNLINK', (select(2, token_and_staged_key(chunk)))) end
  answers[#answers + 1] = answer
end
return answers
