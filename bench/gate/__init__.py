"""The speed gate: a commit against its base, and each operation against the reference it replaces."""
