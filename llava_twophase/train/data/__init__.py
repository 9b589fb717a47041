"""Records to batches: tokenization, features from the cache or the vision tower, order of samples."""
