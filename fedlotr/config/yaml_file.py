"""CONFIG.yaml to values by key and back, with what is wrong in the file in a user's words.

Values are read by `yaml_text`; what is written is quoted wherever that or a plain YAML 1.1 reader would take text for
something else.
"""

import re
from pathlib import Path

import yaml

from fedlotr.config.preflight import sibling
from fedlotr.config.yaml_text import FLOAT, mapping
from fedlotr.errors import shorten

MAX_BYTES = 2**20
"""A configuration has a few kilobytes; what is larger is something else, such as data."""
DATA_SUFFIXES = (".jsonl", ".ndjson", ".gz", ".csv", ".tsv", ".parquet", ".json", ".txt")


class _Writer(yaml.SafeDumper):
    """Quotes text that YAML 1.1 leaves plain and `yaml_text` reads as a number."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"{FLOAT}\Z"), list("-+0123456789."))


def read_yaml(path: Path, problems: list[str]) -> dict[str, object]:
    """The values a file sets, by key; what is wrong with the file as such is added to the problems."""
    text = _text(path, problems)
    if text is None:
        return {}
    hint = "; data are given by --data" if path.name.lower().endswith(DATA_SUFFIXES) else ""
    return mapping(text, shorten(path), problems, expected="clients: 50", hint=hint)


def to_yaml(key: str, value: object) -> str:
    """One key and its value as the lines of a file, without the last line break."""
    text: str = yaml.dump({key: value}, Dumper=_Writer, sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _text(path: Path, problems: list[str]) -> str | None:
    """What a file says, without reading devices and large files; None, and a problem, where it is no text."""
    try:
        if path.is_dir():
            run = path / "config.yaml"
            instead = f", did you mean '{run}'?" if run.is_file() else "; a model is given by --model, data by --data"
            problems.append(f"{shorten(path)}: a folder; expected a configuration file{instead}")
            return None
        if path.exists() and not path.is_file():
            problems.append(f"{shorten(path)}: not a file; expected a configuration file such as run.yaml")
            return None
        if (size := path.stat().st_size) > MAX_BYTES:
            problems.append(
                f"{shorten(path)}: {size:,} bytes are too many for a configuration; data are given by --data"
            )
            return None
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{shorten(path)}: not text in UTF-8 (at byte {error.start + 1}); expected a CONFIG.yaml")
    except ValueError as error:  # a null byte in the name
        problems.append(f"{shorten(path)}: cannot be the name of a file ({error})")
    except OSError as error:
        problem = f"cannot read this configuration file ({error.strerror}){sibling(path)}; options begin with --"
        problems.append(f"{shorten(path)}: {problem}")
    return None
