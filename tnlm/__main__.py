"""``python -m tnlm``: the command line."""

from tnlm.cli.overview import main

main()
