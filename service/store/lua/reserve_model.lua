#!lua
-- List a model among its tenant's, unless the tenant has as many as it may.
-- KEYS[1] names of the tenant's models
-- ARGV[1] model_id  ARGV[2] most models
-- Returns OK or FULL
local models_key, model_id, most = KEYS[1], ARGV[1], tonumber(ARGV[2])

if redis.call('ZSCORE', models_key, model_id) then return 'OK' end
if redis.call('ZCARD', models_key) >= most then return 'FULL' end
redis.call('ZADD', models_key, 0, model_id)
return 'OK'
