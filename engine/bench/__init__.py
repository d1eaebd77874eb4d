"""Measurements of engines: ``python -m engine.bench NAME``."""
