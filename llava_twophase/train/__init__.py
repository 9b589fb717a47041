"""Phase two: a feature cache to a trained projector."""
