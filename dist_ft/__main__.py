"""`python -m dist_ft`: what torchrun starts on every rank."""

import sys

from dist_ft.cli import main

if __name__ == "__main__":
    sys.exit(main())
