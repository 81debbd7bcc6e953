"""Measurements of accuracy, each one file; every method runs on the one path that users run."""
