"""Triton servers and the model repositories that they serve."""
