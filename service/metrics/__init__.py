"""What the server counts of its work, added up over its processes and shown in Prometheus' text form."""
