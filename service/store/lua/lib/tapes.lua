-- The list of a session's tapes: a hash from a tape's name to its entry. The key of a tape is the list's and its name.
-- Library: layouts
local TAPE_ENTRY <const> = '>I8I8c1c16' -- when the tape expires in ms, its bytes, its state, token of its chunk
local TAPE_ENTRY_BYTES <const> = 33
local TAPE_ENTRY_NAME <const> = 'tape_entry' -- in a refusal
local TAPE_WAITING <const> = 'W'
local TAPE_CONSUMED <const> = 'C'

-- Return names and entries in turn; and their refusal.
local function read_tapes(index_key)
  local index = redis.call('HGETALL', index_key)
  for i = 2, #index, 2 do
    local refusal = check_bytes(TAPE_ENTRY_NAME, index[i], TAPE_ENTRY_BYTES)
    if refusal then return index, refusal end
  end
  return index
end

-- Return a tape's entry, false without one; and its refusal.
local function read_tape_entry(index_key, name)
  local entry = redis.call('HGET', index_key, name)
  return entry, check_bytes(TAPE_ENTRY_NAME, entry, TAPE_ENTRY_BYTES)
end

-- Mark a tape consumed: it no longer waits for its Backward, and is kept for a retry only.
local function consume_tape(index_key, name, entry)
  local expires, bytes, _, token = struct.unpack(TAPE_ENTRY, entry)
  redis.call('HSET', index_key, name, struct.pack(TAPE_ENTRY, expires, bytes, TAPE_CONSUMED, token))
end
