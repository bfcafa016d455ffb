"""A launcher of ``modelfuse merge`` with the flags of Paddle's ``mergekit.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modelfuse.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]], n_process=1))
