-- Long values stand under several keys, a part each: a single value would hold up everybody's commands.
local PART_BYTES <const> = 4194304
local PART_NUMBER <const> = '>I2' -- what the key of a part adds to its value's name

local function part_keys(name, count)
  local keys = {}
  for part = 0, count - 1 do keys[part + 1] = name .. struct.pack(PART_NUMBER, part) end
  return keys
end

-- All or nothing: a part made to stay beside one that has expired would stay for ever.
local function persist_all(...)
  for _, keys in ipairs({...}) do
    for _, key in ipairs(keys) do
      if redis.call('EXISTS', key) == 0 then return false end
    end
  end
  for _, keys in ipairs({...}) do
    for _, key in ipairs(keys) do redis.call('PERSIST', key) end
  end
  return true
end

-- A slot may be on its move: a key that is not here any more must not end a decision halfway.
local function drop_all(keys)
  for _, key in ipairs(keys) do redis.pcall('UNLINK', key) end
end
