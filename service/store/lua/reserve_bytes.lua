#!lua
-- Count values that a tenant is about to write, each unless all together would be more than it may keep.
-- A value is counted before it is written and until it is dropped or gone by itself, so that never less is counted
-- than there is, whoever fails in between.
-- KEYS[1] bytes by name  KEYS[2] names by when each is gone
-- ARGV[1] most bytes  ARGV[2…] of each value: name, bytes, for how long it is kept (ms)
-- Returns for each NEW; KNOWN: it was reserved before; FULL: there is no room
-- Library: bytes, clock, tenant_bytes
local sizes_key, ends_key, most = KEYS[1], KEYS[2], tonumber(ARGV[1])
local MOST_LAPSED <const> = 100 -- at once; more only while there is no room
local now = now_ms()

-- Count values no longer that are gone; return whether there were any.
local function drop_lapsed()
  local lapsed = redis.call('ZRANGEBYSCORE', ends_key, '-inf', now, 'LIMIT', 0, MOST_LAPSED)
  return drop_values(sizes_key, ends_key, lapsed) > 0
end

local function has_room(bytes)
  while total_bytes(sizes_key) + bytes > most do
    if not drop_lapsed() then return false end
  end
  return true
end

-- Let a value be counted for so long, and the keys live as long.
local function extend(name, lasts)
  redis.call('ZADD', ends_key, 'GT', now + lasts, name)
  for _, key in ipairs(KEYS) do
    if redis.call('PTTL', key) < lasts then redis.call('PEXPIRE', key, lasts) end
  end
end

local function reserve(name, bytes, lasts)
  local is_known = redis.call('HGET', sizes_key, name)
  if not is_known then
    if not has_room(bytes) then return 'FULL' end
    redis.call('HSET', sizes_key, name, decimal(bytes))
    redis.call('HINCRBY', sizes_key, SUM, decimal(bytes))
  end
  extend(name, lasts)
  return is_known and 'KNOWN' or 'NEW'
end

drop_lapsed()
local answers = {}
for i = 2, #ARGV, 3 do
  answers[#answers + 1] = reserve(ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]))
end
return answers
