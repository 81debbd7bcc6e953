"""Measurements of accuracy: every method runs on the one path that users run."""
