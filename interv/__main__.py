"""`python -m interv` is the console script `interv`."""

from interv.cli import main

main()
