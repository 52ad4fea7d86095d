"""The page on the metrics port: what runs now, read-only, and the JSON behind it."""
