#!lua flags=allow-oom
-- Count values of a tenant no longer: they were dropped, or never written.
-- KEYS[1] bytes by name  KEYS[2] names by when each is gone
-- ARGV[1…] names
-- Returns how many of them were counted
-- Library: tenant_bytes
return drop_values(KEYS[1], KEYS[2], ARGV)
