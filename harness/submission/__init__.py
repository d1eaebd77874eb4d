"""Compliance tests and submission trees."""
