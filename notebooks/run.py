"""Runs the notebooks beside it, each in an empty folder, and keeps what they show.

    python notebooks/run.py            # all; or the names of some

What would tell of the machine or of the day is not kept, nor the kernel's version.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ABOUT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 600
"""That one cell may take at most."""


def executed(path: Path, folder: Path) -> Any:
    """The notebook with its outputs. folder: where its kernel, this interpreter's, begins and leaves its files.

    Raises nbclient's CellExecutionError where a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    own = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)  # not one that somebody has registered here
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own)
    environment = {**os.environ, "IPYTHONDIR": str(folder / ".ipython"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    client = NotebookClient(
        notebook, km=kernel, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(ABOUT)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def main() -> None:
    """Run them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="such as first-steps (default: all)")
    names = options.parse_args().names
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(executed(path, Path(folder)), path)  # type: ignore[no-untyped-call]
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
