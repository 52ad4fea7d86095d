#!lua flags=allow-oom
-- Delete a model with everything in its slot.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints  KEYS[5] contributions
-- KEYS[6] waiting  KEYS[7] expiry  KEYS[8] requests  KEYS[9] request times
-- ARGV[1] incarnation  ARGV[2] prefix of weights  ARGV[3] prefix of moments  ARGV[4] prefix of gradients
-- Returns {DELETED, names of the contributions that waited (32 each)} or {ABSENT}; UNSUPPORTED_LAYOUT, an error:
-- another release laid out an entry
-- Library: contributions, models, parts, versions
local model_key, versions_key, contributions_key, waiting_key = KEYS[1], KEYS[2], KEYS[5], KEYS[6]
local incarnation, weights, moments, gradients = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local slot = {contributions = contributions_key, gradients = gradients}

-- Return the versions' numbers and entries in turn; and their refusal.
local function read_versions()
  local versions = redis.call('HGETALL', versions_key)
  for i = 2, #versions, 2 do
    local refusal = check_version(versions[i])
    if refusal then return versions, refusal end
  end
  return versions
end

-- Return the names of waiting contributions, their entries by name, and their refusal.
local function read_waiting()
  local names, entries = redis.call('ZRANGE', waiting_key, 0, -1), {}
  for _, name in ipairs(names) do
    local entry, refusal = read_contribution(slot, name)
    if refusal then return names, entries, refusal end
    entries[name] = entry
  end
  return names, entries
end

if not is_incarnation(model_key, incarnation) then return {'ABSENT'} end
local versions, refusal = read_versions()
if refusal then return refusal end
local names, waiting, refused = read_waiting()
if refused then return refused end
for i = 1, #versions, 2 do
  drop_all(weights_keys(weights, versions[i], versions[i + 1]))
  drop_all(moments_keys(moments, versions[i], versions[i + 1]))
end
for name, entry in pairs(waiting) do drop_gradient(slot, name, entry) end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
return {'DELETED', table.concat(names)}
