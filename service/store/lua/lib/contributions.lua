-- The contributions to a model: a hash from a contribution's name to its entry; the names of those that wait, sorted;
-- and all names by when each can be forgotten.
-- A `slot` names the keys and prefixes: model, contributions, waiting, expiry, gradients.
-- Library: bytes, layouts, models, parts
local NAME_BYTES <const> = 32 -- session (16), epoch (8), chunk_seq (8)
local WAITING_ENTRY <const> = '>c1c16I8' -- state, digest, bytes of the gradient
local WAITING_ENTRY_BYTES <const> = 25
local CONSUMED_ENTRY <const> = '>c1c16' -- state, digest
local CONSUMED_ENTRY_BYTES <const> = 17
local WAITING <const> = 'W'
local CONSUMED <const> = 'C'
local MOST_FORGOTTEN <const> = 16 -- in one call, which else could take long

local function is_waiting(entry) return entry and string.sub(entry, 1, 1) == WAITING end

local function contribution_digest(entry)
  local _, digest = struct.unpack(CONSUMED_ENTRY, entry)
  return digest
end

-- Return a contribution's entry, false without one; and its refusal.
local function read_contribution(slot, name)
  local entry = redis.call('HGET', slot.contributions, name)
  return entry, check_bytes('contribution', entry, is_waiting(entry) and WAITING_ENTRY_BYTES or CONSUMED_ENTRY_BYTES)
end

-- Return the keys of a gradient: one value, or parts whose names carry its digest as well.
local function gradient_keys(slot, name, digest, bytes)
  if bytes <= PART_BYTES then return {slot.gradients .. name} end
  return part_keys(slot.gradients .. name .. digest, math.ceil(bytes / PART_BYTES))
end

-- Drop the gradient of a waiting contribution and return its bytes.
local function drop_gradient(slot, name, entry)
  local _, digest, bytes = struct.unpack(WAITING_ENTRY, entry)
  drop_all(gradient_keys(slot, name, digest, bytes))
  return bytes
end

-- Consume those of the contributions that wait, and return their names, which stay known, so that a late Backward does
-- not record them again.
local function consume_contributions(slot, names, forget_at)
  local consumed, bytes = {}, 0
  for _, name in ipairs(names) do
    local entry = redis.call('HGET', slot.contributions, name)
    if is_waiting(entry) then
      redis.call('HSET', slot.contributions, name, struct.pack(CONSUMED_ENTRY, CONSUMED, contribution_digest(entry)))
      redis.call('ZREM', slot.waiting, name)
      redis.call('ZADD', slot.expiry, forget_at, name)
      consumed[#consumed + 1], bytes = name, bytes + drop_gradient(slot, name, entry)
    end
  end
  if bytes > 0 then add_bytes(slot.model, WAITING_BYTES, -bytes) end
  return table.concat(consumed)
end

-- Return some of the names that can be forgotten.
local function lapsed_names(expiry_key, now)
  return redis.call('ZRANGEBYSCORE', expiry_key, '-inf', now, 'LIMIT', 0, MOST_FORGOTTEN)
end

local function forget_contribution(slot, name)
  redis.call('HDEL', slot.contributions, name)
  redis.call('ZREM', slot.expiry, name)
end
