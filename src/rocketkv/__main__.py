"""The entry point of `python -m rocketkv`."""

from rocketkv.cli import main

main()
