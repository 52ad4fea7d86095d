-- The bytes of one kind that a tenant keeps: a hash from a value's name to its bytes, with their sum under ''; and the
-- names by when each value is gone by itself. Both keys end with the last of the values.
-- Library: bytes
local SUM <const> = ''

local function total_bytes(sizes_key) return tonumber(redis.call('HGET', sizes_key, SUM) or 0) end

-- Count values no longer; return how many of them were counted.
local function drop_values(sizes_key, ends_key, names)
  local count, bytes = 0, 0
  for _, name in ipairs(names) do
    local size = redis.call('HGET', sizes_key, name)
    if size then
      redis.call('HDEL', sizes_key, name)
      redis.call('ZREM', ends_key, name)
      count, bytes = count + 1, bytes + tonumber(size)
    end
  end
  if bytes > 0 then redis.call('HINCRBY', sizes_key, SUM, decimal(-bytes)) end
  return count
end
