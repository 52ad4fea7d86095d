"""The server: rpc → domain → store, with the compute scheduler between domain and engine."""
