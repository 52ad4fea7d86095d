-- What another release laid out is refused: a script returns the refusal before its first write.

local function unsupported(what, found)
  return redis.error_reply('UNSUPPORTED_LAYOUT ' .. what .. ' ' .. found)
end

local BYTES <const> = ' bytes' -- how a length reads in a refusal

-- Return the refusal of bytes of another length than ours; nil for ours, or without any.
local function check_bytes(what, data, size)
  if data and #data ~= size then return unsupported(what, #data .. BYTES) end
end
