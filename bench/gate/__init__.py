"""The speed gate: a commit against its base, and each operation against its reference."""
