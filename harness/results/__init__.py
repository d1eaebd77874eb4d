"""Runs and what comes of them: result.json, accuracy, tables, pictures."""
