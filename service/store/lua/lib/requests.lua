-- The requests that a model remembers: a hash from a request to the digest of its content and its answer; and when each
-- was remembered.
local CONTENT_BYTES <const> = 16

local function request_content(remembered) return string.sub(remembered, 1, CONTENT_BYTES) end

local function request_answer(remembered) return string.sub(remembered, CONTENT_BYTES + 1) end

local function remember_request(requests_key, times_key, request, remembered, now)
  redis.call('HSET', requests_key, request, remembered)
  redis.call('ZADD', times_key, now, request)
end
