"""Files of a row a line, CSV or JSON lines, within limits, each row as a form has it."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from fedlotr.errors import InputError, nearest, shorten
from fedlotr.fleet.forms import keys_of, problem

MOST_BYTES = 2**30
"""Of one file: ten million intervals and more."""
LONGEST_LINE = 2**16
"""Characters of one line, of which rows need a hundred."""
MOST_TOLD = 10
"""Lines of one file that are told of; a file in another form is wrong in each."""
JSON_LINES, CSV = (".jsonl", ".ndjson"), (".csv",)
EXPECTED = "expected JSON lines (.jsonl) or CSV with a header (.csv)"

_Form = TypeVar("_Form", bound=BaseModel)


def read_rows(path: Path, form: type[_Form], keep: Callable[[_Form], None], problems: list[str]) -> None:
    """Hand each row on; what is wrong with the file is added to the problems, with its lines.

    keep: raises InputError where a row is in its form, but still wrong.
    """
    name, ending = shorten(path), path.suffix.lower()
    if ending not in JSON_LINES + CSV:
        problems.append(f"{name}: {EXPECTED}")
        return
    wrong = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if (size := path.stat().st_size) > MOST_BYTES:
                problems.append(f"{name}: {size:,} bytes; at most {MOST_BYTES:,} are read, divide it")
                return
            for line, values in _of_json(file) if ending in JSON_LINES else _of_csv(file, keys_of(form)):
                if not (found := values if isinstance(values, InputError) else _kept(values, form, keep)):
                    continue
                if wrong == MOST_TOLD:
                    problems.append(f"{name}: further lines were not looked at")
                    return
                wrong += 1
                problems.append(f"{name}, line {line}: {'; '.join(found.problems)}")
    except UnicodeDecodeError as error:
        problems.append(f"{name}: not text in UTF-8 ({error.reason}); {EXPECTED}")
    except (OSError, ValueError) as error:  # a null byte in a name is no OSError
        problems.append(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error}); {EXPECTED}")


def _kept(values: object, form: type[_Form], keep: Callable[[_Form], None]) -> InputError | None:
    try:
        keep(form.model_validate(values))
    except ValidationError as error:
        return InputError([problem(detail, form) for detail in error.errors()])
    except InputError as error:
        return error
    return None


def _lines(file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(f"line {number} has more than {LONGEST_LINE:,} characters")
        yield line


def _of_json(file: TextIO) -> Iterator[tuple[int, Any]]:
    """The number of each line and its values, or what is wrong with it; blank lines are passed over."""
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"not JSON ({getattr(error, 'msg', error)})")


def _of_csv(file: TextIO, keys: list[str]) -> Iterator[tuple[int, Any]]:
    """The same; cells that are empty say nothing."""
    reader, header = csv.reader(_lines(file), strict=True), list[str]()
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not header:
                header = cells
                wrong = [f"{shorten(key)}: no such column{nearest(key, keys)}" for key in header if key not in keys]
                wrong += [f"{key} is there twice" for key in keys if header.count(key) > 1]
                if wrong:
                    yield reader.line_num, InputError(wrong)
                    return
            elif len(cells) != len(header):
                yield reader.line_num, InputError(f"{len(cells)} cells; the header has {len(header)}")
            else:
                yield reader.line_num, {key: cell for key, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        yield reader.line_num, InputError(f"not CSV ({error})")
