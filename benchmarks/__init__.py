"""Benchmarks: the engine against its peers, the service against its peers, always in one run."""
