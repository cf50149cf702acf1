"""Does what `test_blocks.py` found in a page, step by step in the current folder; ends with 1 where a step fails.

Commands of ours are forks of this process, which has their libraries, made before anything else is: a process of its
own would import them for seconds. All others are a shell's.
"""

import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SAID = Path("..") / "said.txt"
"""By a command; beside the folder, where no page finds it."""


def words_of(command: str) -> list[str]:
    """Of a command of ours that is nothing else; none of one that needs a shell."""
    if set(command) & set("|&;<>()$`*?[]~#\n"):
        return []
    words = shlex.split(command)
    return words if words[:1] == ["fedlotr"] or words[:3] == ["python", "-m", "fedlotr.simulate"] else []


class Ready:
    """A process that waits until it is told to do a command of ours."""

    def __init__(self, words: list[str]) -> None:
        wait, self._tell = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._tell)
            if not os.read(wait, 1):
                os._exit(0)  # the page has failed before
            said = os.open(SAID, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(said, stream)
            sys.argv = words[words.index("-m") + 1 :] if words[0] == "python" else words
            if words[0] == "python":
                from fedlotr.commands.simulate import main
            else:
                from fedlotr.cli import main
            sys.exit(main())
        os.close(wait)

    def run(self) -> tuple[int, str]:
        """(its exit code, what it said)."""
        os.write(self._tell, b"1")
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status), SAID.read_text(encoding="utf-8")


def by_shell(command: str) -> tuple[int, str]:
    """The same of any command."""
    words = ["bash", "-c", command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    """The steps of the file that is named."""
    steps: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ours = {at: words for at, step in enumerate(steps) if (words := words_of(step.get("command", "")))}
    ready = {at: Ready(words) for at, words in ours.items()}
    for at, step in enumerate(steps):
        began = time.monotonic()
        match step["do"]:
            case "write":
                Path(step["file"]).parent.mkdir(parents=True, exist_ok=True)
                Path(step["file"]).write_text(step["text"], encoding="utf-8")
            case "console":
                code, said = ready[at].run() if at in ready else by_shell(step["command"])
                if code != step["exit"]:
                    print(said[-5000:], file=sys.stderr)
                    sys.exit(f"{step['where']}: ended with {code} and not {step['exit']}: {step['command']}")
            case "python":
                try:
                    # Line breaks in front, so that a traceback has the page's lines.
                    code = compile("\n" * (step["line"] - 1) + step["text"], step["page"], "exec")
                    exec(code, sys.modules["__main__"].__dict__)
                except Exception:
                    traceback.print_exc()
                    sys.exit(f"{step['where']}: it raises")
        took = f"{time.monotonic() - began:6.1f} s  {step['where']}  {step['do']} {step.get('command', '')[:100]}"
        print(took, flush=True)
