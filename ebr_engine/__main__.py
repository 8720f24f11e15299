"""`python -m ebr_engine` is `ebr-engine`."""

from ebr_engine.cli import main

main()
