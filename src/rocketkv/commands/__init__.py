"""The commands, a file per subject: they parse, call and print. `cli.py` puts them together."""
