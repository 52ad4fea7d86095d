#!lua flags=no-writes
-- Count how often logins of a token on the page were ended.
-- KEYS[1] how often
-- Returns the number
return tonumber(redis.call('GET', KEYS[1]) or '0')
