#!lua flags=no-writes
-- List a session's tapes that wait for their Backward, with where the session stands.
-- KEYS[1] record  KEYS[2] marker  KEYS[3] tape index
-- Returns {head and tail or '', marker or '', then for each tape its name: epoch (8) and seq (8), and its token (16)};
-- UNSUPPORTED_LAYOUT, an error: another release laid out the record or an entry
-- Library: clock, sessions, tapes
local record_key, marker_key, index_key = KEYS[1], KEYS[2], KEYS[3]

local head_and_tail, refusal = read_head_and_tail(record_key)
if refusal then return refusal end
local index, refused = read_tapes(index_key)
if refused then return refused end
local answer, now = {head_and_tail, redis.call('GET', marker_key) or ''}, now_ms()
for i = 1, #index, 2 do
  local expires, _, state, token = struct.unpack(TAPE_ENTRY, index[i + 1])
  if state == TAPE_WAITING and expires > now then answer[#answer + 1] = index[i] .. token end
end
return answer
