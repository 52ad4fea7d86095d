#!lua
-- Give a version a name under which it is kept.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints
-- ARGV[1] incarnation  ARGV[2] name  ARGV[3] version: number (8) and digest (16), or '' for the head
-- ARGV[4] most checkpoints
-- Returns {CREATED, checkpoint} | {KNOWN, checkpoint} | {EXISTS} | {VERSION_GONE} | {FORKED} | {QUOTA} | {GONE};
-- a checkpoint is number (8) digest (16) time of creation in ms (8). UNSUPPORTED_LAYOUT, an error: another release laid
-- out the checkpoint or the version's entry
-- Library: checkpoints, clock, models, versions
local slot, checkpoints_key = {model = KEYS[1], versions = KEYS[2], superseded = KEYS[3]}, KEYS[4]
local incarnation, name, wanted, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])

if not is_incarnation(slot.model, incarnation) then return {'GONE'} end
local known, refusal = read_checkpoint(checkpoints_key, name)
if refusal then return refusal end
if known then
  if wanted == '' or string.sub(known, 1, VERSION_NAME_BYTES) == wanted then return {'KNOWN', known} end
  return {'EXISTS'}
end
local version = wanted == '' and read_model_head(slot.model) or wanted
local number, digest = struct.unpack(VERSION_NAME, version)
local entry = redis.call('HGET', slot.versions, number)
if not entry then return {'VERSION_GONE'} end
refusal = check_version(entry)
if refusal then return refusal end
if version_digest(entry) ~= digest then return {'FORKED'} end
if redis.call('HLEN', checkpoints_key) >= most then return {'QUOTA'} end
local checkpoint = version .. struct.pack(CREATED, now_ms())
redis.call('HSET', checkpoints_key, name, checkpoint)
redis.call('HSET', slot.versions, number, with_checkpoints(entry, checkpoint_count(entry) + 1))
take_off_superseded(slot, number, entry)
return {'CREATED', checkpoint}
