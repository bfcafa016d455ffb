"""``python -m modelfuse`` is the ``modelfuse`` command."""

import sys

from modelfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
