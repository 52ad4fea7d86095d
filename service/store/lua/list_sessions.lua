#!lua flags=no-writes
-- Read a page of a tenant's sessions, the next to expire first.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] score of the last one seen, or ''  ARGV[2] its name  ARGV[3] page size
-- Returns {name, score, name, score, …}
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local from, skip = ARGV[1], true
if from == '' or tonumber(from) < now then from, skip = string.format('%.0f', now), false end
local size, page, seen = tonumber(ARGV[3]), {}, 0
while #page < 2 * size do
  local some = redis.call('ZRANGEBYSCORE', KEYS[1], from, '+inf', 'WITHSCORES', 'LIMIT', seen, size)
  if #some == 0 then break end
  for i = 1, #some, 2 do
    local before = skip and tonumber(some[i + 1]) == tonumber(from) and some[i] <= ARGV[2]
    if not before and #page < 2 * size then
      page[#page + 1], page[#page + 2] = some[i], some[i + 1]
    end
  end
  seen = seen + #some / 2
end
return page
