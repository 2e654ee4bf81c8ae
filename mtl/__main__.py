"""`python -m mtl` is the command ``mtl``, where its script is not on the path."""

from mtl.cli.main import main

main()
