#!lua flags=no-writes
-- Read in one look what an Update decides from: request id, head and contributions. In two looks a
-- late duplicate would find the contributions gone and be refused for a step that was made.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] requests
-- ARGV[1] 16 bytes that name the request
-- ARGV[2…] each a name (32), what names begin with (16 or 24), or '' for all that wait
-- Returns {incarnation, specification, head, what was remembered of the request or '', then for each
-- contribution that waits its name (32) and digest (16)}; {} without a model; UNSUPPORTED_LAYOUT, an error: another release laid out
-- a contribution

-- The refusal of a contribution's entry of another length than ours; nil for our own, or for none.
local function unknown_contribution(entry)
  if not entry or #entry == (string.sub(entry, 1, 1) == 'W' and 25 or 17) then return end
  return redis.error_reply('UNSUPPORTED_LAYOUT contribution ' .. #entry .. ' bytes')
end

local model = redis.call('HMGET', KEYS[1], 'incarnation', 'spec', 'head')
if not model[1] then return {} end
local answer = {model[1], model[2], model[3], redis.call('HGET', KEYS[4], ARGV[1]) or ''}
for i = 2, #ARGV do
  if #ARGV[i] == 32 then
    local entry = redis.call('HGET', KEYS[2], ARGV[i])
    local unknown = unknown_contribution(entry)
    if unknown then return unknown end
    if entry and string.sub(entry, 1, 1) == 'W' then answer[#answer + 1] = ARGV[i] .. string.sub(entry, 2, 17) end
  else
    local from = ARGV[i] == '' and '-' or '[' .. ARGV[i]
    local to = ARGV[i] == '' and '+' or '[' .. ARGV[i] .. string.rep('\255', 17)
    for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], from, to)) do
      local entry = redis.call('HGET', KEYS[2], name)
      local unknown = unknown_contribution(entry)
      if unknown then return unknown end
      answer[#answer + 1] = name .. string.sub(entry, 2, 17)
    end
  end
end
return answer
