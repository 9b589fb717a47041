"""Checks of a feature cache: verify, repair, duplicates."""
