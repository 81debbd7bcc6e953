"""The commands, one file per subject, which parse, call and print. `cli.py` puts them together."""
