-- The versions of a model: a hash from a version's number to its entry; and the superseded ones by when they became so.
-- A `slot` names the keys and prefixes: model, versions, superseded, weights, moments.
-- Library: bytes, layouts, models, parts
local VERSION_ENTRY <const> = '>c16I8I2I2I2' -- digest, bytes, parts, moments' parts, checkpoints that keep it
local VERSION_ENTRY_BYTES <const> = 30
local VERSION_NAME <const> = '>c8c16' -- number, digest
local VERSION_NAME_BYTES <const> = 24
-- What a superseded version counts beside its bytes, so that tiny ones are bounded in number too.
local VERSION_CHARGE <const> = 4096

local function check_version(entry) return check_bytes('version_entry', entry, VERSION_ENTRY_BYTES) end

local function version_digest(entry) return (struct.unpack(VERSION_ENTRY, entry)) end

-- Return how many checkpoints keep a version.
local function checkpoint_count(entry) return (select(5, struct.unpack(VERSION_ENTRY, entry))) end

local function with_checkpoints(entry, count)
  local digest, bytes, parts, moment_parts = struct.unpack(VERSION_ENTRY, entry)
  return struct.pack(VERSION_ENTRY, digest, bytes, parts, moment_parts, count)
end

local function weights_keys(prefix, number, entry)
  local digest, _, parts = struct.unpack(VERSION_ENTRY, entry)
  return part_keys(prefix .. digest .. number, parts)
end

local function moments_keys(prefix, number, entry)
  local digest, _, _, parts = struct.unpack(VERSION_ENTRY, entry)
  return part_keys(prefix .. digest .. number, parts)
end

local function add_superseded(slot, entry, sign)
  local _, bytes = struct.unpack(VERSION_ENTRY, entry)
  add_bytes(slot.model, SUPERSEDED_BYTES, sign * (bytes + VERSION_CHARGE))
end

-- Let a version age that no checkpoint keeps and that is the head no more; its moments go at once.
local function supersede(slot, number, entry, now)
  local digest, bytes, parts = struct.unpack(VERSION_ENTRY, entry)
  drop_all(moments_keys(slot.moments, number, entry))
  redis.call('HSET', slot.versions, number, struct.pack(VERSION_ENTRY, digest, bytes, parts, 0, 0))
  redis.call('ZADD', slot.superseded, now, number)
  add_superseded(slot, entry, 1)
end

-- Take a version off those that are superseded, if it is one of them.
local function take_off_superseded(slot, number, entry)
  if redis.call('ZREM', slot.superseded, number) == 1 then add_superseded(slot, entry, -1) end
end
