"""The head of a base that is a classifier already: gone on with where its labels are the data's, by their names."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from fedlotr.data.labels import key_of
from fedlotr.errors import shorten
from fedlotr.models.loading import HEADS, ModelSpec

UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls labels that nobody named."""
SHOWN = 10
"""Labels named one by one."""


def with_saved_head(spec: ModelSpec, names: Sequence[str]) -> tuple[ModelSpec, str | None]:
    """The same base with the head of its files, where that is for these classes; and what must be said of it, or None.

    names: the classes of the data. A row of the head is a class's by its label's name, whatever the case; labels
    without names are the classes that are called by their indices. Rows of further labels are left out.
    """
    rows = 0 if spec.mean_pooled or spec.code is not None or not spec.headed else _rows_in_files(spec)
    if not rows or not (names or spec.scale):
        return spec, None
    if spec.scale:  # what its numbers are of, and in which unit, no file says
        return spec, f"it has a head for {rows} label{'s' if rows > 1 else ''}, which is dropped; a new one begins"
    labels, kind = saved_labels(spec, rows)
    if all(UNNAMED.fullmatch(label) for label in labels) and list(names) == [str(row) for row in range(rows)]:
        found = {name: row for row, name in enumerate(names)}
    else:
        found = {key_of(label): row for row, label in enumerate(labels)}
    chosen = [found.get(name, found.get(key_of(name))) for name in names]
    known = tuple(row for row in chosen if row is not None)
    if kind or len(set(known)) < len(names) or len(found) < rows:
        of = kind or f"a classifier of {_some(labels)}"
        way = " (where names alone differ, give the same to the data's classes, or to id2label in its config.json)"
        return spec, (
            f"it is {of}; its head is dropped, as the classes of the data are {_some(names)}, and a new one begins"
            f"{'' if kind else way}"
        )
    kept = replace(spec, head_rows=known, head_labels=rows)
    left = [label for row, label in enumerate(labels) if row not in known]
    return kept, f"its head is gone on with, but for labels that the data lack: {_some(left)}" if left else None


def saved_labels(spec: ModelSpec, rows: int) -> tuple[tuple[str, ...], str]:
    """The labels of a head with so many rows, as config.json names them; and what it is where it is no classifier's."""
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
    kind = str(getattr(config, "problem_type", None) or "single_label_classification")
    named = {str(row): str(label) for row, label in (config.id2label or {}).items()}
    labels = tuple(named.get(str(row), f"LABEL_{row}") for row in range(rows))
    made = next(iter(config.architectures or ()), "")
    if made and not made.endswith("ForSequenceClassification"):
        return labels, f"a {made} of {rows} labels"
    if kind != "single_label_classification" or rows < 2:
        return labels, "a model of one score" if rows < 2 else f"a model for {kind.replace('_', ' ')} of {rows} labels"
    return labels, ""


def _rows_in_files(spec: ModelSpec) -> int:
    """Rows of the last matrix of the head in a base's files; 0 where there is none."""
    rows = 0
    for path in sorted(Path(spec.path).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                heads = [name for name in file.keys() if name.split(".")[0] in HEADS and name.endswith(".weight")]  # noqa: SIM118
                shapes = {name: file.get_slice(name).get_shape() for name in sorted(heads)}
        except (OSError, SafetensorError):
            continue  # loading them says what is wrong
        rows = next((shape[0] for shape in reversed(shapes.values()) if len(shape) == 2), rows)
    return rows


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shorten(name) for name in names[:SHOWN]) + more
