"""Phase one: images to a feature cache."""
