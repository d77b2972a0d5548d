"""`python -m ckptd.cli`."""

from ckptd.cli.main import main

main()
