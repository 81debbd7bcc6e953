"""Measurements of speed and memory, each in a file of its own."""
