"""Measurements of accuracy, in which every method runs the code that users run."""
