"""Benchmark of libnms_opt.so on a GPU: ``python -m plugin_cuda.bench``."""
