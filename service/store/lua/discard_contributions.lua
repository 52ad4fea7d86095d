#!lua flags=allow-oom
-- Drop waiting contributions. Their names stay counted, so a late Backward cannot bring them back.
-- KEYS[1] model  KEYS[2] contributions  KEYS[3] waiting  KEYS[4] expiry
-- ARGV[1] incarnation  ARGV[2] prefix of gradients  ARGV[3] time for which a name is remembered (ms)
-- ARGV[4…] each a name (32), what names begin with (16 or 24), or '' for all that wait
-- Returns their number, or -1 without this model; UNSUPPORTED_LAYOUT, an error: another release laid out an entry

-- The refusal of a contribution's entry of another length than ours; nil for our own, or for none.
local function unknown_contribution(entry)
  if not entry or #entry == (string.sub(entry, 1, 1) == 'W' and 25 or 17) then return end
  return redis.error_reply('UNSUPPORTED_LAYOUT contribution ' .. #entry .. ' bytes')
end

if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return -1 end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local dropped = 0
-- Remove a waiting gradient: one value, or parts of 4 MiB whose names carry its digest as well.
local function drop_gradient(name, entry)
  local parts = math.ceil(struct.unpack('>I8', entry, 18) / 4194304)
  if parts <= 1 then redis.pcall('UNLINK', ARGV[2] .. name) return end
  for part = 0, parts - 1 do
    redis.pcall('UNLINK', ARGV[2] .. name .. string.sub(entry, 2, 17) .. struct.pack('>I2', part))
  end
end
local function drop(name)
  local entry = redis.call('HGET', KEYS[2], name)
  if not entry or string.sub(entry, 1, 1) ~= 'W' then return end
  redis.call('HSET', KEYS[2], name, 'C' .. string.sub(entry, 2, 17))
  redis.call('ZREM', KEYS[3], name)
  redis.call('ZADD', KEYS[4], now + tonumber(ARGV[3]), name)
  drop_gradient(name, entry)
  redis.call('HINCRBY', KEYS[1], 'waiting', string.format('%.0f', -struct.unpack('>I8', entry, 18)))
  dropped = dropped + 1
end
local names = {}
for i = 4, #ARGV do
  if #ARGV[i] == 32 then names[#names + 1] = ARGV[i]
  else
    local from = ARGV[i] == '' and '-' or '[' .. ARGV[i]
    local to = ARGV[i] == '' and '+' or '[' .. ARGV[i] .. string.rep('\255', 17)
    for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], from, to)) do names[#names + 1] = name end
  end
end
for _, name in ipairs(names) do
  local unknown = unknown_contribution(redis.call('HGET', KEYS[2], name))
  if unknown then return unknown end
end
for _, name in ipairs(names) do drop(name) end
return dropped
