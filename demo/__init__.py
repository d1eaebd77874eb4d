"""Generator of the demo data set and training of the demo checkpoint."""
