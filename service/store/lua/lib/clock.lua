-- The store's clock, in ms since 1970.
local function now_ms()
  local time = redis.call('TIME')
  return math.floor((tonumber(time[1]) * 1000000 + tonumber(time[2])) / 1000)
end
