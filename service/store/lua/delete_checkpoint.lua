#!lua flags=allow-oom
-- Take a checkpoint's name away; its version then ages like any superseded one.
-- KEYS[1] model  KEYS[2] versions  KEYS[3] superseded  KEYS[4] checkpoints
-- ARGV[1] incarnation  ARGV[2] name  ARGV[3] prefix of moments
-- Returns DELETED | ABSENT | GONE; UNSUPPORTED_LAYOUT, an error: another release laid out the checkpoint or the
-- version's entry
-- Library: checkpoints, clock, models, versions
local checkpoints_key, incarnation, name = KEYS[4], ARGV[1], ARGV[2]
local slot = {model = KEYS[1], versions = KEYS[2], superseded = KEYS[3], moments = ARGV[3]}

if not is_incarnation(slot.model, incarnation) then return 'GONE' end
local checkpoint, refusal = read_checkpoint(checkpoints_key, name)
if not checkpoint then return 'ABSENT' end
if refusal then return refusal end
local number = struct.unpack(VERSION_NAME, checkpoint)
local entry = redis.call('HGET', slot.versions, number)
refusal = check_version(entry)
if refusal then return refusal end
redis.call('HDEL', checkpoints_key, name)
local others = checkpoint_count(entry) - 1
if others > 0 or struct.unpack(VERSION_NAME, read_model_head(slot.model)) == number then
  redis.call('HSET', slot.versions, number, with_checkpoints(entry, others))
else
  supersede(slot, number, entry, now_ms())
end
return 'DELETED'
