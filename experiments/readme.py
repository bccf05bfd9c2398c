"""README.md and docs/*.md from the committed results: python -m experiments.readme."""

import sys

from bn_research.lab.pages import main

if __name__ == "__main__":
    sys.exit(main())
