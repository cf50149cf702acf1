"""Does what `test_blocks.py` found in a page, step by step in the current folder; ends with 1 where a step fails."""

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """The steps of the file that is named."""
    for step in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        began = time.monotonic()
        match step["do"]:
            case "write":
                Path(step["file"]).parent.mkdir(parents=True, exist_ok=True)
                Path(step["file"]).write_text(step["text"], encoding="utf-8")
            case "console":
                words = ["bash", "-c", step["command"]]
                done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
                if done.returncode != step["exit"]:
                    print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
                    sys.exit(f"{step['where']}: ended with {done.returncode} and not {step['exit']}: {step['command']}")
            case "python":
                try:
                    # Line breaks in front, so that a traceback has the page's lines.
                    code = compile("\n" * (step["line"] - 1) + step["text"], step["page"], "exec")
                    exec(code, sys.modules["__main__"].__dict__)
                except Exception:
                    traceback.print_exc()
                    sys.exit(f"{step['where']}: it raises")
        print(f"{time.monotonic() - began:6.1f} s  {step['where']}  {step['do']} {step.get('command', '')[:100]}")


if __name__ == "__main__":
    sys.path.insert(0, "")  # a reader's own files, as `python` at a prompt finds them
    main()
