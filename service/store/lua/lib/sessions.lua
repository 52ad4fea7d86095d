-- A session's record: its head, its tail and its ring of slots, as service/store/layouts.py lays them out.
-- Library: layouts
local RECORD <const> = 'session' -- in a refusal
local RECORD_LAYOUT <const> = 1
local HEAD_BYTES <const> = 80
-- Layout, slots, bytes of the tail, bytes of a state, epoch, chunk_seq, ttl, when the tenant's list was last updated.
local HEAD_NUMBERS <const> = '>I1I1I2I4I8I8I8I8'
local SLOTS_AT <const> = 1
local CHUNK_SEQ_AT <const> = 16
local AFTER_CHUNK <const> = '>I8I8I8' -- what a chunk changes in the head: chunk_seq, ttl, when the list was updated
local MOST_TAIL_BYTES <const> = 128
local SLOT_HEAD_BYTES <const> = 64
local SLOT_CHUNK_SEQ <const> = '>I8'
local SLOT_TOKEN_AT <const> = 24
local TOKEN <const> = '>c16'
local TOKEN_BYTES <const> = 16
local EMPTY <const> = '\255' -- every byte of a slot that no chunk has filled
-- How often within its ttl a session that gets chunks extends its marker and its entry in the tenant's list.
local EXTENSIONS_PER_TTL <const> = 4

-- Return the first bytes of a record, '' without one; and the refusal of what another release laid out.
local function read_head(key, size)
  local head = redis.call('GETRANGE', key, 0, (size or HEAD_BYTES) - 1)
  if head == '' then return head end
  local layout = string.byte(head)
  if layout ~= RECORD_LAYOUT then return head, unsupported(RECORD, 'layout ' .. layout) end
  if #head < HEAD_BYTES then return head, unsupported(RECORD, #head .. BYTES) end
  return head
end

local function read_head_and_tail(key)
  local record, refusal = read_head(key, HEAD_BYTES + MOST_TAIL_BYTES)
  if record == '' or refusal then return record, refusal end
  local _, _, tail = struct.unpack(HEAD_NUMBERS, record)
  return string.sub(record, 1, HEAD_BYTES + tail)
end

-- Return the offset in a record of the slot of a chunk.
local function slot_at(tail, slots, size, chunk_seq)
  return HEAD_BYTES + tail + (chunk_seq % slots) * (SLOT_HEAD_BYTES + size)
end

-- Return how long a marker lives, so that it outlives its session by `extra` though it is not extended with each chunk.
local function marker_ttl(ttl, extra) return ttl + math.floor(ttl / EXTENSIONS_PER_TTL) + extra end
