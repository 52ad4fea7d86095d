-- The store's clock, in ms since 1970.
local US_PER_S <const> = 1000000
local US_PER_MS <const> = 1000

local function now_ms()
  local time = redis.call('TIME')
  return math.floor((tonumber(time[1]) * US_PER_S + tonumber(time[2])) / US_PER_MS)
end
