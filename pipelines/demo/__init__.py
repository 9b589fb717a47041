"""The demo: both phases and inspection on real weights, run by `make demo`."""
