"""Checks of a whole feature cache: verification, repair, duplicates."""
