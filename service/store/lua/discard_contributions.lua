#!lua flags=allow-oom
-- Drop waiting contributions. Their names stay known as consumed, so a late Backward cannot bring them back.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] expiry
-- ARGV[1] incarnation  ARGV[2] prefix of gradients  ARGV[3] time for which a name is remembered (ms)
-- ARGV[4…] selectors: each a name (32), what names begin with (16 or 24), or '' for all that wait
-- Returns their names (32 each), or -1 without this model; UNSUPPORTED_LAYOUT, an error: another release laid out an
-- entry
-- Library: clock, contributions, models, selectors
local slot = {model = KEYS[1], contributions = KEYS[2], waiting = KEYS[3], expiry = KEYS[4], gradients = ARGV[2]}
local incarnation, remembered_ms = ARGV[1], tonumber(ARGV[3])

if not is_incarnation(slot.model, incarnation) then return -1 end
local names = {}
for i = 4, #ARGV do
  for _, name in ipairs(selected_names(slot.waiting, ARGV[i])) do
    local _, refusal = read_contribution(slot, name)
    if refusal then return refusal end
    names[#names + 1] = name
  end
end
return consume_contributions(slot, names, now_ms() + remembered_ms)
