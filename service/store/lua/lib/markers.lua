-- The marker that outlives a session: its epoch, and whether the session was closed.
-- Library: bytes, sessions
local MARKER_EPOCH <const> = '>I8'
local MARKER_BYTES <const> = 9
local MARKER_LIVE <const> = 'L'
local MARKER_CLOSED <const> = 'C'

local function check_marker(marker) return check_bytes('marker', marker, MARKER_BYTES) end

-- Write a marker. It does not expire before the one that it replaces: the writers of an earlier epoch may rely on that.
local function write_marker(key, epoch, state, ttl, extra)
  local stays = math.max(redis.call('PTTL', key), marker_ttl(ttl, extra))
  redis.call('SET', key, struct.pack(MARKER_EPOCH, epoch) .. state, 'PX', decimal(stays))
end
