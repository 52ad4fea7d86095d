-- Name what the connection's user may not do of what the service does.
-- It asks without running anything, so that a right which is missing is found before a call needs it.
-- KEYS none
-- ARGV[1] how many names of keys follow  ARGV[2] … these, one of each pattern
-- ARGV the rest: commands, such as 'get' or 'cluster|slots'
-- Returns the commands and keys that are refused
local count = tonumber(ARGV[1])

local function may(command, key)
  local name, sub = string.match(command, '^(.-)|(.+)$')
  if name then
    return redis.acl_check_cmd(name, sub)
  end
  if command == 'eval' or command == 'evalsha' then
    return redis.acl_check_cmd(command, '', '0')
  end
  return redis.acl_check_cmd(command, key, key)
end

local missing = {}
local usable = {}
for i = 2, count + 1 do
  if may('set', ARGV[i]) or may('get', ARGV[i]) then
    table.insert(usable, ARGV[i])
  else
    table.insert(missing, ARGV[i])
  end
end
for i = count + 2, #ARGV do
  if not may(ARGV[i], usable[1] or ARGV[2]) then
    table.insert(missing, ARGV[i])
  end
end
return missing
