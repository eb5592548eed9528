"""`python -m blockjobs` is the command `blockjobs`."""

from blockjobs.cli.main import run_and_exit

run_and_exit()
