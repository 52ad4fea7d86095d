"""Where arithmetic runs: beside the event loop, in batches of what has queued."""
