-- Lists whose entries stand by the time at which they lapse.
local MOST_DROPPED <const> = 100 -- lapsed entries in one call

-- Take entries off that have lapsed; what is left over goes at another call.
local function forget_lapsed(list_key, now)
  for _, lapsed in ipairs(redis.call('ZRANGEBYSCORE', list_key, '-inf', now, 'LIMIT', 0, MOST_DROPPED)) do
    redis.call('ZREM', list_key, lapsed)
  end
end
