"""`python -m rocketkv`."""

from rocketkv.cli import main

main()
