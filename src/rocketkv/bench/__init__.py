"""Measurements of speed and memory, a file each; `commands.py` is how the command line reaches them."""
