#!lua flags=allow-oom
-- End the logins of a token on the page; one small record a token, so that a full store takes it too.
-- KEYS[1] how often logins of the token were ended
-- ARGV[1] how often they had been when the login was made that ends  ARGV[2] time to live (ms)
-- Returns nil
local ended = tonumber(redis.call('GET', KEYS[1]) or '0')
redis.call('SET', KEYS[1], math.max(ended, ARGV[1] + 1), 'PX', ARGV[2])
