"""Where the records live: Redis keys, their layouts, and one Lua file a script."""
