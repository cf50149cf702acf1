"""Which cells of a column name the same client, and which name none."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedlotr.data.columns import is_missing
from fedlotr.errors import InputError

NOBODY = frozenset({"nan", "NaN", "NAN", "-nan", "-NaN", "NaT", "<NA>", "None", "null", "NULL", "#N/A"})
"""What libraries write for no value where they write text; a person or a place is called otherwise."""
EXACT = 2**53
"""From here on decimal numbers do not tell neighbouring whole numbers apart."""
SHOWN = 3
"""Clients whose spellings are told, and forms of an empty cell."""


def one_client_each(column: str, values: Sequence[Any], *, told: bool = True) -> tuple[list[Any], list[str]]:
    """The values, with None where a cell names no client and one spelling for each client; and what is to be said.

    A cell is empty where it has no value, NaN, white space or what libraries write for these. Two texts are one client
    where they differ in Unicode form, width, white space or invisible characters, or as 1 does from 1.0; it has the
    spelling that is most frequent, or comes first.
    told: whether it may be said which clients those are, and how many rows have none.
    Raises InputError for decimal numbers that are too large to tell clients apart.
    """
    large = next((value for value in values if isinstance(value, float) and EXACT <= abs(value) < float("inf")), None)
    if large is not None:
        which = f"{large:.0f}" if told else f"a number beyond {EXACT:,}"
        raise InputError(
            f"--partition natural:{column}: {which} and its neighbours are one number, since '{column}' holds "
            "decimal numbers (or whole ones beside empty cells, read as such); write them as text or as whole numbers"
        )
    empty = Counter(_in_words(value) for value in values if _names_nobody(value))
    spellings: dict[Any, Counter[Any]] = {}
    for value in values:
        if not _names_nobody(value):
            spellings.setdefault(_key(value), Counter())[value] += 1
    chosen = {key: counts.most_common(1)[0][0] for key, counts in spellings.items()}
    several = [list(counts) for counts in spellings.values() if len(counts) > 1]
    notes = []
    if empty:
        count = f"{sum(empty.values()):,} of {len(values):,} rows" if told else "some rows (how many, is private)"
        forms = ", ".join(form for form, _ in empty.most_common(SHOWN))
        notes.append(f"--partition natural:{column}: {count} name no client ('{column}' is {forms}) and are left out")
    if several:
        examples = "; ".join(" and ".join(ascii(name) for name in names[:SHOWN]) for names in several[:SHOWN])
        one = (
            "some clients are"
            if not told
            else "one client is"
            if len(several) == 1
            else f"{len(several):,} clients are"
        )
        which = examples if told else "which, is private"
        notes.append(f"--partition natural:{column}: {one} written in several ways and taken as one each: {which}")
    return [None if _names_nobody(value) else chosen[_key(value)] for value in values], notes


def name_of(value: Any) -> str:
    """What a client is called whose cell holds this: a whole number without a point, however it was kept."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _names_nobody(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and (not _key(value) or value.strip() in NOBODY))


def _in_words(value: Any) -> str:
    if isinstance(value, str) and value.strip() in NOBODY:
        return repr(value.strip())
    return "NaN" if isinstance(value, float) else "empty"


def _key(value: Any) -> Any:
    """Equal for the spellings of one client."""
    if not isinstance(value, str):
        return value
    seen = "".join(c for c in unicodedata.normalize("NFKC", value) if unicodedata.category(c) not in ("Cf", "Cc"))
    text = " ".join(seen.split())
    whole = re.fullmatch(r"([+-]?\d+)\.0*", text)
    return whole[1] if whole else text
