"""The door of `python -m fedlotr.simulate [CONFIG.yaml] [options]`: from words to a run to an exit code."""

import sys

from fedlotr.commands.simulate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
