-- A model's record: a hash with these fields.
-- Library: bytes
local INCARNATION <const> = 'incarnation'
local SPECIFICATION <const> = 'spec'
local HEAD <const> = 'head'
local WAITING_BYTES <const> = 'waiting'
local SUPERSEDED_BYTES <const> = 'superseded'

-- Return whether a model is the one that a caller knows; a name may have been deleted and created again.
local function is_incarnation(model_key, incarnation)
  return redis.call('HGET', model_key, INCARNATION) == incarnation
end

local function read_model_head(model_key) return redis.call('HGET', model_key, HEAD) end

local function read_bytes(model_key, field) return tonumber(redis.call('HGET', model_key, field)) end

local function add_bytes(model_key, field, bytes) redis.call('HINCRBY', model_key, field, decimal(bytes)) end
