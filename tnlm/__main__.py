"""``python -m tnlm``: the command line."""

from tnlm.cli.main import main

main()
