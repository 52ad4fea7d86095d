-- The checkpoints of a model: a hash from a checkpoint's name to the version that it keeps and when it was created.
-- Library: layouts
local CREATED <const> = '>I8' -- after number and digest of the version: when the checkpoint was created, in ms
local CHECKPOINT_BYTES <const> = 32

-- Return a checkpoint, false without one; and its refusal.
local function read_checkpoint(checkpoints_key, name)
  local checkpoint = redis.call('HGET', checkpoints_key, name)
  return checkpoint, check_bytes('checkpoint', checkpoint, CHECKPOINT_BYTES)
end
