"""The door of `python -m fedlotr.simulate [CONFIG.yaml] [options]`: from words to a run to an exit code."""

import sys

from fedlotr.commands.door import BAD_INPUT, FAILED
from fedlotr.commands.simulate import DONE, main

__all__ = ["BAD_INPUT", "DONE", "FAILED", "main"]

if __name__ == "__main__":
    sys.exit(main())
