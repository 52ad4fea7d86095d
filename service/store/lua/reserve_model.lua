#!lua
-- Note a model in its tenant's list, unless the tenant has as many as it may.
-- KEYS[1] names of the tenant's models
-- ARGV[1] model_id  ARGV[2] most models
-- Returns OK or FULL
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 'OK' end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 'FULL' end
redis.call('ZADD', KEYS[1], 0, ARGV[1])
return 'OK'
