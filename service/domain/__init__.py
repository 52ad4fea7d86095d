"""The rules: sessions, models and training, with typed errors and no transport or store types."""
