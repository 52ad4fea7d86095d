"""Servers that the service is measured against, each started as its own process."""
