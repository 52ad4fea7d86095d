"""Load generators: one closed loop for every server, only the stub differs."""
