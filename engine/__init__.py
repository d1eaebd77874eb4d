"""Engines: calibrate, quantise, build, run and compare. One protocol, one module per backend."""
