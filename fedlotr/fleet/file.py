"""A fleet's file, where it and the files that it names lie, and what rows say of single clients."""

from pathlib import Path

from pydantic import ValidationError

from fedlotr.communication.links import Link, read_link
from fedlotr.config.yaml_text import mapping
from fedlotr.errors import InputError, nearest, shorten
from fedlotr.fleet.devices import Device, read_device
from fedlotr.fleet.forms import Client, Description, beyond, problem
from fedlotr.fleet.presets import FLEETS

MAX_BYTES = 2**20
"""Of a fleet's file, which has a few lines."""


def path_of(given: str) -> Path:
    """Where a fleet's file lies, with the home folder for ~."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # of nobody: there will be no such file
        return Path(given)


def files_of(given: str) -> dict[str, Path]:
    """What a fleet is made of: its file, and what that names, told from its folder; nothing of a preset.

    Raises InputError.
    """
    if given in FLEETS:
        return {}
    path = path_of(given)
    words = read_description(path)
    kind, _, behind = (words.availability or "").partition(":")
    named = {"trace": words.trace or (behind if kind == "trace" else None), "clients": words.clients}
    return {"file": path, **{part: path.parent / name for part, name in named.items() if name}}


def read_description(path: Path) -> Description:
    """What a fleet's file says. Raises InputError with every mistake."""
    name, problems = shorten(path), list[str]()
    try:
        if not path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
            raise InputError(f"--fleet {name}: no such fleet{nearest(path, FLEETS)} (or a FILE.yaml)")
        if not path.is_file():
            raise InputError(f"--fleet {name}: no such file; expected a FILE.yaml, or one of: {', '.join(FLEETS)}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"--fleet {name}: {size:,} bytes are too many for a fleet; rows belong in `clients: FILE`")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--fleet {name}: not text in UTF-8 (at byte {error.start + 1}); expected YAML") from None
    except (OSError, ValueError) as error:  # a null byte in the name is no OSError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--fleet {name}: cannot be read ({reason}); expected a FILE.yaml") from None
    values = mapping(text, name, problems, expected="devices: phone")
    try:
        words = Description.model_validate(values)
    except ValidationError as error:
        problems += [f"{name}: {problem(detail, Description)}" for detail in error.errors()]
    if problems:
        raise InputError(problems)
    return words


class Own:
    """What rows say of single clients, by their numbers."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.devices: dict[int, Device] = {}
        self.links: dict[int, Link] = {}
        self.dropouts: dict[int, float] = {}
        self._seen: set[int] = set()

    def keep(self, row: Client) -> None:
        """Raises InputError."""
        rates = {key: value for key in ("up", "down", "latency") if (value := getattr(row, key)) is not None}
        wrong = []
        if row.client >= self.clients:
            wrong.append(beyond(row.client, self.clients))
        if row.client in self._seen:
            wrong.append(f"client {row.client} has a line already; keep one of both")
        if row.device is not None and row.flops is not None:
            wrong.append("device and flops: expected one of both")
        if row.link is not None and rates:
            wrong.append(f"link and {', '.join(rates)}: expected one of both")
        if wrong:
            raise InputError(wrong)
        self._seen.add(row.client)
        device = row.device if row.flops is None else f"flops={row.flops}"
        link = ",".join(f"{key}={value}" for key, value in rates.items()) or row.link
        if device is not None:
            self.devices[row.client] = read_device(device, "device")
        if link is not None:
            self.links[row.client] = read_link(link, "link")
        if row.dropout is not None:
            self.dropouts[row.client] = row.dropout
