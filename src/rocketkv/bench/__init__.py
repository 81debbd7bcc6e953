"""Measurements of speed and memory, a file each."""
