-- Bytes and numbers. Offsets count from 0, as in service/store/layouts.py.

-- Return so many bytes from an offset on.
local function slice(data, at, size) return string.sub(data, at + 1, at + size) end

-- Return a whole number as text; tostring would keep 14 digits only.
local function decimal(number) return string.format('%.0f', number) end
