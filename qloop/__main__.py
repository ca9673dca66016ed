"""`python -m qloop` and `accelerate launch -m qloop`: the same commands as `qloop`."""

from qloop.cli import main

main()
