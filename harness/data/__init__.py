"""Data sets: which images, and preprocessing them."""
