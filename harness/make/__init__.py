"""The make targets: the route of a benchmark, system configurations, tuning."""
