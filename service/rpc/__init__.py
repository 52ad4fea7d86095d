"""gRPC: decode, check, call the domain, encode. No rule of the domain stands here.

A call comes in through the `gate`, which knows gRPC, and passes the `dispatcher`, which does not.
docs/architecture.md has a table of the modules.
"""
