"""The demo: both phases and the inspection on real weights, from `make demo`; the package knows nothing of it."""
