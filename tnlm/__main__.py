"""``python -m tnlm``: the command line."""

from tnlm.cli import main

main()
