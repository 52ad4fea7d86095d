#!lua
-- Create a model whose first version's weights and moments have been written under their names.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] requests  KEYS[4] request times
-- ARGV[1] incarnation  ARGV[2] specification  ARGV[3] head: number (8) and digest (16)
-- ARGV[4] 16 bytes that name the request, or ''  ARGV[5] digest of its content
-- ARGV[6] entry of the version  ARGV[7] prefix of weights  ARGV[8] prefix of moments
-- Returns CREATED | REPLAYED | EXISTS | REUSED | STALE: a part is not there, or not any more
-- Library: bytes, clock, models, requests, versions
local model_key, versions_key, requests_key, request_times_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local incarnation, specification, head, request, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local entry, weights, moments = ARGV[6], ARGV[7], ARGV[8]
local now = now_ms()

if redis.call('EXISTS', model_key) == 1 then
  local known = request ~= '' and redis.call('HGET', requests_key, request)
  if not known then return 'EXISTS' end
  return request_content(known) == content and 'REPLAYED' or 'REUSED'
end
local number = struct.unpack(VERSION_NAME, head)
if not persist_all(weights_keys(weights, number, entry), moments_keys(moments, number, entry)) then return 'STALE' end
redis.call('HSET', model_key, INCARNATION, incarnation, SPECIFICATION, specification, HEAD, head,
  'created', decimal(now), WAITING_BYTES, 0, SUPERSEDED_BYTES, 0)
redis.call('HSET', versions_key, number, entry)
if request ~= '' then remember_request(requests_key, request_times_key, request, content, now) end
return 'CREATED'
