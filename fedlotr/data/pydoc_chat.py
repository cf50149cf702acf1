"""The built-in conversations: questions about the standard library, answered by its own documentation.

Real text, by nature not identically distributed (a module is a client), on every machine and without a download. As for
`pydoc` the sources of the running interpreter are parsed and never imported, so the set changes with the interpreter.

Documentation repeats itself, and a model must not be tested on what it was taught: a split takes whole *families*. Two
rows are of one family where their answers are alike (`families.py`; `re.sub` and `re.subn`), or where they are about
things of one name (`gzip.open` and `bz2.open`, `asyncio.Future.cancel` and `concurrent.futures.Future.cancel`).
Measured with Python 3.11.7, 4,041 rows in 2,924 families: of the runs of five words in the answers of the test split
1.8 % stand anywhere in those of train (of rows drawn singly 16.8 %); no test answer has a third of its runs there, 81 %
have none.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedlotr.data.columns import Columns
from fedlotr.data.families import families, words_of
from fedlotr.data.prose import prose
from fedlotr.data.pydoc import PARTS, parsed, sources, without_sources
from fedlotr.libraries import not_collecting

LEFT_OUT = {"__future__", "encodings", "idlelib", "sre_compile", "sre_constants", "sre_parse", "turtledemo"}
"""Modules of many files, or nobody's, and hardly any documentation that answers a question."""

PUBLIC = {"genericpath": "os.path", "posixpath": "os.path", "_collections_abc": "collections.abc"}
"""Files whose names their users do not say."""
NOT_PUBLIC = {"_markupbase", "_strptime"}
"""Private homes whose things are no part of the public module."""

NO_FUNCTION = {"_SpecialForm", "overload", "setter", "deleter"}
"""Decorators of what is none, or has its documentation elsewhere."""

SIGNATURE = 60
"""Characters up to which a question may spell out a signature."""

QUESTIONS = {
    "function": (
        "What does `{name}` do?",
        "What does the function `{short}` of Python's module `{module}` do?",
        "Explain `{name}{signature}` in Python's standard library.",
        "What is `{name}` for?",
        "In Python, what happens when I call `{name}{signature}`?",
    ),
    "class": (
        "What is `{name}`?",
        "What is the class `{short}` of Python's module `{module}`?",
        "What is `{name}` for?",
        "Describe the class `{name}` of Python's standard library.",
    ),
    "method": (
        "What does the method `{method}` of `{owner}` do?",
        "What does `{name}` do?",
        "In Python, what does `{short}{signature}` of the module `{module}` do?",
        "Explain `{method}{signature}` of `{owner}`.",
    ),
    "property": (
        "What is the property `{method}` of `{owner}`?",
        "What does `{name}` tell me?",
        "In Python, what is `{short}` of the module `{module}`?",
    ),
    "module": (
        "What is Python's module `{name}` for?",
        "What does the module `{name}` of the standard library do?",
        "Tell me about `{name}` in Python's standard library.",
        "What is in the module `{name}`?",
    ),
}
"""Kind of thing -> ways to ask after it, one of which its name chooses."""


@dataclass(frozen=True)
class Thing:
    """What a docstring is of.

    kind: a key of QUESTIONS. module: where it stands, without private parts. path: its name in there; empty for the
    module. signature: its parameters in brackets.
    """

    kind: str
    module: str
    path: str
    signature: str = ""

    @property
    def name(self) -> str:
        """Its whole name."""
        return f"{self.module}.{self.path}" if self.path else self.module

    @property
    def question(self) -> str:
        """A question about it, always the same for the same name."""
        ways = QUESTIONS[self.kind]
        way = ways[int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % len(ways)]
        owner, _, method = self.name.rpartition(".")
        return way.format(
            name=self.name, short=self.path, module=self.module, owner=owner, method=method, signature=self.signature
        )


def build_pydoc_chat() -> tuple[Columns, list[int]]:
    """The conversations in the order of (module, file, position), and the family of each row.

    Columns: `prompt` (a question), `answer` (the first sentences of the documentation, 30 to 400 characters; of equal
    ones the first is kept), `client` (the top-level module), `part` (of the library reference) and `kind` (function,
    class, method, property or module).
    Raises InputError where the interpreter comes without its library's sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts = {module: part for part, modules in PARTS.items() for module in modules.split()}
    columns: Columns = {name: [] for name in ("prompt", "answer", "client", "part", "kind")}
    names: list[str] = []
    seen: set[str] = set()
    with not_collecting():  # syntax trees hold no cycles
        for module in sorted(parts.keys() - LEFT_OUT):
            for thing, answer in _answers(library, module):
                words = " ".join(words_of(answer))
                if seen.isdisjoint((words, thing.name)):
                    seen |= {words, thing.name}
                    names.append(thing.path or thing.module)
                    client = thing.module.partition(".")[0]
                    row = (thing.question, answer, client, parts[client], thing.kind)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
    if not names:
        raise without_sources("pydoc-chat", library)
    return columns, families(columns["answer"], names)


def _answers(library: Path, module: str) -> Iterator[tuple[Thing, str]]:
    exported: set[tuple[str, str]] = set()
    for file in sources(library, module):
        tree = parsed(file) if b'"""' in file.read_bytes() or file.stem == "__init__" else None
        if tree is None or file.stem in NOT_PUBLIC:
            continue
        parts = file.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            exported |= _exports(tree, ".".join(parts))
        for thing, docstring in _documented(tree, parts, module, exported):
            if (answer := prose(docstring)) is not None:
                yield thing, answer


def _exports(package: ast.Module, name: str) -> set[tuple[str, str]]:
    """(module, name in it) that a package hands on from its modules; "*" for all that a module has to offer."""
    found = set()
    for node in package.body:
        if isinstance(node, ast.ImportFrom) and node.module and (node.level == 1 or node.module.startswith(f"{name}.")):
            module = node.module if not node.level else f"{name}.{node.module}"
            found |= {(module, one.name) for one in node.names}
    return found


def _documented(
    tree: ast.Module, parts: tuple[str, ...], top: str, exported: set[tuple[str, str]]
) -> Iterator[tuple[Thing, str]]:
    """Public things under the names by which their users know them.

    parts: the file's place, such as ("asyncio", "tasks"), whose `gather` is asyncio.gather.
    """
    module, package = ".".join(parts), ".".join(parts[:-1])
    private = f".{module}".count("._") > (len(parts) == 1)
    offered = _offered(tree) if (module, "*") in exported else set()
    home = PUBLIC.get(module, module if len(parts) > 1 else top)
    if (docstring := ast.get_docstring(tree)) and not parts[-1].startswith("_"):
        yield Thing("module", home, ""), docstring
    for thing, docstring in _members(tree, home, ""):
        name = thing.path.partition(".")[0]
        if "._" not in package and ((module, name) in exported or name in offered):
            yield replace(thing, module=package), docstring
        elif not private:
            yield thing, docstring


def _offered(tree: ast.Module) -> set[str]:
    """What stands in `__all__`."""
    return {
        item.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for item in getattr(node.value, "elts", [])
        if isinstance(item, ast.Constant) and isinstance(item.value, str)
    }


def _members(node: ast.AST, module: str, within: str) -> Iterator[tuple[Thing, str]]:
    """Public functions and classes with their docstrings, in source order. within: the class that they are in."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, []):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if child.name.startswith("_") or _marks(child) & NO_FUNCTION:
                    continue
                path = f"{within}.{child.name}" if within else child.name
                if docstring := ast.get_docstring(child):
                    yield _thing(child, module, path), docstring
                if isinstance(child, ast.ClassDef):
                    yield from _members(child, module, path)
            elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
                yield from _members(child, module, within)


def _thing(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str, path: str) -> Thing:
    if isinstance(node, ast.ClassDef):
        return Thing("class", module, path)
    marks = _marks(node)
    if any(mark.endswith("property") for mark in marks):
        return Thing("property", module, path)
    written = ast.unparse(node.args).replace("*, ", "", node.args.vararg is None and not node.args.kwonlyargs)
    if "." in path and "staticmethod" not in marks:
        written = written.partition(", ")[2]
    plain = len(written) <= SIGNATURE and not re.search(r"\b_|\bself\b", written)
    return Thing("method" if "." in path else "function", module, path, f"({written})" if plain else "")


def _marks(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names of its decorators, without where they come from."""
    return {getattr(mark, "id", "") or getattr(mark, "attr", "") for mark in node.decorator_list}
