-- Which waiting contributions a caller means: each selector is a name, what names begin with, or '' for all that wait.
-- Library: contributions

local function selected_names(waiting_key, selector)
  if #selector == NAME_BYTES then return {selector} end
  if selector == '' then return redis.call('ZRANGEBYLEX', waiting_key, '-', '+') end
  return redis.call('ZRANGEBYLEX', waiting_key, '[' .. selector, '[' .. selector .. string.rep('\255', NAME_BYTES))
end
