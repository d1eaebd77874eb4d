"""Downloads: the benchmark's data and models."""
