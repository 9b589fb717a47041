"""Looking at a feature cache, read-only."""
