#!lua flags=no-writes
-- Read a page of a tenant's sessions, the next to expire first.
-- KEYS[1] tenant's sessions by the time at which they expire
-- ARGV[1] score of the last session of the page before, or ''  ARGV[2] its name  ARGV[3] page size
-- Returns {name, score, name, score, …}
-- Library: bytes, clock
local sessions_key, last_score, last_name, size = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()
-- Where the last session of the page before has expired since, the page begins with what has not.
local goes_on = last_score ~= '' and tonumber(last_score) >= now
local from = goes_on and last_score or decimal(now)

local page, seen = {}, 0
while #page < 2 * size do
  local found = redis.call('ZRANGEBYSCORE', sessions_key, from, '+inf', 'WITHSCORES', 'LIMIT', seen, size)
  if #found == 0 then break end
  for i = 1, #found, 2 do
    local name, score = found[i], found[i + 1]
    local is_before = goes_on and tonumber(score) == tonumber(from) and name <= last_name
    if not is_before and #page < 2 * size then page[#page + 1], page[#page + 2] = name, score end
  end
  seen = seen + #found / 2
end
return page
