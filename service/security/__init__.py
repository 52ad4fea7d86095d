"""Who may call, and over which wire: credentials and certificates, read from files that may change."""
