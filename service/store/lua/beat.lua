#!lua flags=allow-oom
-- Note that a replica runs, and what it says of itself; small and bounded, so that a full store takes it too.
-- KEYS[1] replicas by the time at which they lapse  KEYS[2] this replica's record  KEYS[3] the page's secret
-- ARGV[1] replica's name  ARGV[2] record  ARGV[3] time to live (ms)  ARGV[4] secret to keep if there is none
-- ARGV[5] time to live of the secret (ms)
-- Returns the secret that all replicas have now
-- Library: clock, lapsed
local replicas_key, record_key, secret_key = KEYS[1], KEYS[2], KEYS[3]
local name, record, ttl, secret, secret_ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local now = now_ms()

forget_lapsed(replicas_key, now)
redis.call('ZADD', replicas_key, now + ttl, name)
redis.call('PEXPIRE', replicas_key, ttl)
redis.call('SET', record_key, record, 'PX', ttl)
local kept = redis.call('GET', secret_key)
if kept then
  redis.call('PEXPIRE', secret_key, secret_ttl)
  return kept
end
redis.call('SET', secret_key, secret, 'PX', secret_ttl)
return secret
