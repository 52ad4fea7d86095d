#!lua flags=allow-oom
-- Delete a model with everything in its slot.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints  KEYS[5] contributions
-- KEYS[6] waiting  KEYS[7] expiry  KEYS[8] requests  KEYS[9] request times
-- ARGV[1] incarnation  ARGV[2] prefix of weights  ARGV[3] prefix of moments  ARGV[4] prefix of gradients
-- Returns DELETED or ABSENT; UNSUPPORTED_LAYOUT, an error: another release laid out an entry

-- The refusal of an entry of another length than ours; nil for our own, or for none.
local function unknown_entry(what, entry, size)
  if entry and #entry ~= size then return redis.error_reply('UNSUPPORTED_LAYOUT ' .. what .. ' ' .. #entry .. ' bytes') end
end

-- The refusal of a contribution's entry of another length than ours; nil for our own, or for none.
local function unknown_contribution(entry)
  if not entry or #entry == (string.sub(entry, 1, 1) == 'W' and 25 or 17) then return end
  return redis.error_reply('UNSUPPORTED_LAYOUT contribution ' .. #entry .. ' bytes')
end

if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 'ABSENT' end
local versions = redis.call('HGETALL', KEYS[2])
for i = 2, #versions, 2 do
  local unknown = unknown_entry('version_entry', versions[i], 30)
  if unknown then return unknown end
end
local waiting = redis.call('ZRANGE', KEYS[6], 0, -1)
for i, name in ipairs(waiting) do
  waiting[i] = {name, redis.call('HGET', KEYS[5], name)}
  local unknown = unknown_contribution(waiting[i][2])
  if unknown then return unknown end
end
for i = 1, #versions, 2 do
  local parts, moment_parts = struct.unpack('>I2I2', versions[i + 1], 25)
  local name = string.sub(versions[i + 1], 1, 16) .. versions[i]
  for part = 0, parts - 1 do redis.pcall('UNLINK', ARGV[2] .. name .. struct.pack('>I2', part)) end
  for part = 0, moment_parts - 1 do redis.pcall('UNLINK', ARGV[3] .. name .. struct.pack('>I2', part)) end
end
-- Remove a waiting gradient: one value, or parts of 4 MiB whose names carry its digest as well.
local function drop_gradient(name, entry)
  local parts = math.ceil(struct.unpack('>I8', entry, 18) / 4194304)
  if parts <= 1 then redis.pcall('UNLINK', ARGV[4] .. name) return end
  for part = 0, parts - 1 do
    redis.pcall('UNLINK', ARGV[4] .. name .. string.sub(entry, 2, 17) .. struct.pack('>I2', part))
  end
end
for _, one in ipairs(waiting) do drop_gradient(one[1], one[2]) end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
return 'DELETED'
