#!lua flags=no-writes
-- Read a consistent snapshot of what an Update decides from: request id, head and contributions. In two reads a
-- late duplicate would find the contributions gone and be refused for a step that was made.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] requests
-- ARGV[1] 16 bytes that name the request
-- ARGV[2…] selectors: each a name (32), what names begin with (16 or 24), or '' for all that wait
-- Returns {incarnation, specification, head, what was remembered of the request or '', then for each
-- contribution that waits its name (32) and digest (16)}; {} without a model; UNSUPPORTED_LAYOUT, an error: another
-- release laid out a contribution
-- Library: contributions, models, selectors
local model_key, slot, requests_key, request = KEYS[1], {contributions = KEYS[2], waiting = KEYS[3]}, KEYS[4], ARGV[1]

local incarnation, specification, head = unpack(redis.call('HMGET', model_key, INCARNATION, SPECIFICATION, HEAD))
if not incarnation then return {} end
local answer = {incarnation, specification, head, redis.call('HGET', requests_key, request) or ''}
for i = 2, #ARGV do
  for _, name in ipairs(selected_names(slot.waiting, ARGV[i])) do
    local entry, refusal = read_contribution(slot, name)
    if refusal then return refusal end
    if is_waiting(entry) then answer[#answer + 1] = name .. contribution_digest(entry) end
  end
end
return answer
