"""Pixels to patch features: pictures, the image processor, the frozen tower."""
