"""Every experiment, and one report of all claims: python -m experiments.reproduce."""

import sys

from bn_research.lab.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
