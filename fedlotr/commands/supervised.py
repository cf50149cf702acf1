"""A run as `fedlotr simulate` has it, that is interrupted when its supervisor is gone.

The supervisor holds the other end of standard input and never writes to it; that end closes however it dies.
"""

import os
import signal
import sys
import threading

from fedlotr.commands import simulate


def _watch() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    threading.Thread(target=_watch, daemon=True).start()
    sys.exit(simulate.main())
