"""Projectors, patch features to image tokens: LLaVA's own, five from papers, and a user's own class."""
