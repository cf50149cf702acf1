"""The built-in data set: paragraphs of the standard library's docstrings, sorted by part of the library reference.

Real text, naturally not identically distributed, on every machine and without a download: the sources of the running
interpreter are parsed and never imported. It changes with the interpreter, so its fingerprint belongs in every result.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlotr.errors import InputError
from fedlotr.libraries import not_collecting

WORDS = range(6, 81)
"""Words in a paragraph: shorter ones say nothing of their part, longer ones are mostly tables and listings."""

PARTS: dict[str, str] = {
    # Text processing, binary data, structured markup, internationalisation.
    "text": """
        codecs difflib encodings gettext html locale re readline rlcompleter sre_compile sre_constants sre_parse string
        stringprep struct textwrap unicodedata xml
    """,
    # Data types, functional programming.
    "data types": """
        array bisect calendar collections copy datetime enum functools graphlib heapq itertools operator pprint reprlib
        time types weakref zoneinfo
    """,
    # Numeric and mathematical modules.
    "numeric": "cmath decimal fractions math numbers random statistics",
    # File and directory access, persistence, compression, file formats, cryptographic digests, multimedia.
    "files and formats": """
        bz2 colorsys compression configparser copyreg csv dbm filecmp fileinput fnmatch genericpath glob gzip hashlib
        hmac linecache lzma marshal netrc ntpath nturl2path pathlib pickle plistlib posixpath secrets shelve shutil
        sqlite3 stat tarfile tempfile tomllib wave zipfile zlib
    """,
    # Generic and Unix services of the operating system, concurrent execution, interprocess communication.
    "OS and concurrency": """
        asyncio concurrent contextvars ctypes errno getpass io logging mmap multiprocessing os platform pty queue sched
        select selectors signal subprocess threading tty
    """,
    # Networking, internet data handling, internet protocols.
    "internet and email": """
        base64 binascii email ftplib http imaplib ipaddress json mailbox mimetypes poplib quopri smtplib socket
        socketserver ssl urllib uuid webbrowser wsgiref xmlrpc
    """,
    # Development tools, debugging, packaging, runtime services, importing modules, language services.
    "development and runtime": """
        __future__ abc annotationlib ast atexit bdb cProfile code codeop compileall contextlib dataclasses dis doctest
        ensurepip faulthandler gc importlib inspect keyword modulefinder opcode pdb pickletools pkgutil profile pstats
        py_compile pyclbr pydoc runpy site symtable sysconfig tabnanny timeit token tokenize trace traceback
        tracemalloc typing unittest venv warnings zipapp zipimport
    """,
    # Command line interfaces, program frameworks, graphical interfaces with Tk.
    "interfaces": "argparse cmd curses getopt idlelib optparse shlex tkinter turtle turtledemo",
}
"""Part of the library reference -> its modules. A part is a class; its place here is its label.

Modules that newer interpreters have dropped (distutils, lib2to3, cgi, ...) are left out: the set stays alike from
version to version.
"""

PRIVATE_HOMES = {
    "collections": ["_collections_abc"],
    "datetime": ["_pydatetime"],
    "decimal": ["_pydecimal"],
    "html": ["_markupbase"],
    "io": ["_pyio"],
    "threading": ["_threading_local"],
    "time": ["_strptime"],
    "warnings": ["_py_warnings"],
}
"""Public modules whose docstrings are kept in a private one."""

TEST_FOLDERS = {"test", "tests", "idle_test"}


def build_pydoc() -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The paragraphs in the order of (module, file, position), and the names of the eight labels.

    A row is `text` (one paragraph of 6 to 80 words, white space collapsed; of equal paragraphs the first is kept),
    `label` (the part of the library reference) and `client` (the top-level module).
    Raises InputError where the interpreter comes without its library's sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    labels = {module: label for label, modules in enumerate(PARTS.values()) for module in modules.split()}
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    with not_collecting():  # syntax trees hold no cycles
        for module, label in sorted(labels.items()):
            for file in sources(library, module):
                for text in _paragraphs(file):
                    if text not in seen:
                        seen.add(text)
                        rows.append({"text": text, "label": label, "client": module})
    if not rows:
        raise without_sources("pydoc", library)
    return rows, tuple(PARTS)


def without_sources(data: str, library: Path) -> InputError:
    """What is to be raised where a data set of the library's sources has no rows."""
    return InputError(
        f"--data {data}: no sources of the standard library in {library}; this interpreter comes without them, "
        "so give a folder of JSON lines instead"
    )


def sources(library: Path, module: str) -> Iterator[Path]:
    """The files of a top-level module, sorted within a package, and then those of its private homes."""
    for name in [module, *PRIVATE_HOMES.get(module, [])]:
        yield from filter(Path.is_file, [library / f"{name}.py"])
        package = library / name
        for file in sorted(package.rglob("*.py")):
            if TEST_FOLDERS.isdisjoint(file.relative_to(package).parts):
                yield file


def parsed(file: Path) -> ast.Module | None:
    """The syntax tree of a file; None where it is no Python of this version."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a library's own invalid escapes are not our user's concern
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _paragraphs(file: Path) -> Iterator[str]:
    tree = parsed(file)
    for docstring in [] if tree is None else _docstrings(tree):
        for block in re.split(r"\n\s*\n", docstring):
            words = block.split()
            if len(words) in WORDS and ">>>" not in words:
                text = " ".join(words)
                drawing = sum(map(str.isalpha, text)) < len(text) / 2
                if not drawing:
                    yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in source order. Only statements are visited: `ast.walk` spends its time in expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, []):
            if hasattr(child, "body"):  # the others, nine in ten, hold no statements
                yield from _docstrings(child)
