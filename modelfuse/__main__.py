"""The command: ``modelfuse``, or ``python -m modelfuse``."""

import gc
import os
import sys
from collections.abc import Sequence

# What is imported stays: looking for garbage in it, again and again, is a twentieth of the time until work begins.
gc.disable()

# Nothing here multiplies matrices, and starting the threads that would takes longer than planning a merge.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(words: Sequence[str] | None = None, **defaults: object) -> int:
    """Run the command line; see :func:`modelfuse.cli.main.main`."""
    if os.name == "nt":
        print("modelfuse runs on Linux and macOS. On Windows, use it in WSL, the Windows Subsystem for Linux.",
              file=sys.stderr)  # fmt: skip
        return 2
    from modelfuse.cli.main import main as run

    try:
        return run(words, **defaults)
    finally:
        gc.freeze()  # All that is left goes with the process.


if __name__ == "__main__":
    sys.exit(main())
