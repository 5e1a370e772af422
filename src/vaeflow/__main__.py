"""`python -m vaeflow`."""

from vaeflow.cli import main

main()
