"""Pixels to patch features: image files, the image processor, the frozen tower."""
