"""What a run has spent of its clients' privacy: a file that only grows, written before anything is released.

Its first line is what was promised when the run began, the settings that the promise rests on, and a keyed hash of the
examples that it is about; every other line is charged before the messages of a round go out, and is on disk by then. So
a run that is killed and resumed charges a repeated round again, and forgets none.

Beside it lies its key, which nobody else is to have: whoever has it can try out which data the hash is of. Each line
ends in a code of it and all lines before, made with the key, and the file of the key says how many charges there are at
least: a line that was edited, moved, copied, taken from another run or lost is noticed. In this order: the key, the
first line; then for each round its line, the count, the messages. So where the count is 0, nothing has gone out.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fedlotr.errors import InputError
from fedlotr.files import write_atomically
from fedlotr.privacy.accounting import Releases, within

NAME = "privacy.jsonl"
KEY = "privacy.key"
FORMAT = 2
"""Of the ledger; the first did not say so, nor what data it had paid for."""
BRING_BACK = "bring it back from a copy, or start a new run with another --out"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Promise:
    """What was settled before the first round, and holds for the whole run.

    unit: what adjacent data differ in: one example of one client, or one client. target: epsilon, which no step may
    take a unit over; None: any is paid, and reported. sigma: standard deviation of the noise over the bound of one
    unit's contribution. rates: of the accounts, the probability with which a unit is in a step's sum. steps: of the
    accounts, in a round. planned: of the accounts, the steps that sigma was calibrated for.
    An account is a client where examples are hidden; where clients are, there is one, of all of them.
    reproducible: whether the noise can be made again from the seed.
    """

    unit: Literal["example", "client"]
    target: float | None
    delta: float
    sigma: float
    rates: list[float]
    steps: list[int]
    planned: list[int] = field(default_factory=list)
    reproducible: bool = False

    def releases(self, account: int, steps: int) -> Releases:
        """So many steps of an account, as accountants take them."""
        return Releases(self.sigma, self.rates[account], steps)


class Ledger:
    """One run's, kept in a file of its directory."""

    def __init__(
        self,
        path: Path,
        promise: Promise,
        settings: Mapping[str, Any],
        data: str,
        key: bytes,
        lines: Sequence[str] = (),
        whole: bool = True,
    ) -> None:
        """See `begin` and `open`. data: the keyed hash. lines: as they stand in the file; none, where it is new.

        whole: whether there is nothing else in it, and as many of them as the key's file knows of.
        """
        self.path, self.promise, self.settings, self.data = path, promise, settings, data
        self._key, self._whole = key, whole
        self._lines = list(lines)
        if not lines:
            self._lines = [self._coded({"format": FORMAT, **asdict(promise), "settings": {**settings}, "data": data})]
        self.spent = [0] * len(promise.rates)
        """Steps of each account."""
        for line in self._lines[1:]:
            for account in json.loads(line)["accounts"]:
                self.spent[account] += promise.steps[account]

    @classmethod
    def open(cls, path: Path) -> "Ledger | None":
        """The ledger of a run that goes on, which nothing is written to yet; None where it is certain that no message
        has gone out, or where there has been none.

        Raises InputError where it cannot be read, or is not what was written last.
        """
        key = _read_key(path.with_name(KEY))
        if not path.exists():
            if key is not None and key[1]:
                raise InputError(f"--resume: {path} is missing, so nobody knows what is spent; {BRING_BACK}")
            return None
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        try:
            lines = whole.decode().split("\n")
            first = json.loads(lines[0])
            if "format" not in first:
                raise InputError(
                    f"--resume: {path} was written by fedlotr 0.1, which did not note what data it had paid for, so "
                    "nobody could say what is spent: go on with that version, or start a new run with another --out"
                )
            settings, data = first["settings"], first["data"]
            promise = Promise(**{name: first[name] for name in Promise.__dataclass_fields__})
            if key is None:
                raise InputError(
                    f"--resume: {path.with_name(KEY)} is missing, without which nobody can say whether {path.name} is "
                    f"about these data; {BRING_BACK}"
                )
            charges = len(lines) - 1
            ledger = cls(path, promise, settings, data, key[0], lines, whole=not torn and charges == key[1])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"--resume: {path} cannot be read ({error}), and without it nobody knows what is spent; {BRING_BACK}"
            ) from error
        # A kill may come between a line and the count, before anything of that round has gone out.
        if not key[1] <= charges <= key[1] + 1 or not ledger._is_as_written():
            raise InputError(
                f"--resume: {path} has lost or changed lines, or is another run's, so nobody knows what is spent; "
                f"{BRING_BACK}"
            )
        return ledger

    @classmethod
    def begin(cls, path: Path, promise: Promise, settings: Mapping[str, Any] = NOTHING, data: bytes = b"") -> "Ledger":
        """The ledger of a new run, or of one of which nothing has gone out yet.

        settings: what else the promise rests on, as JSON has it. data: a hash of the examples; it is not written.
        """
        path.unlink(missing_ok=True)
        key = secrets.token_bytes(32)
        _write_key(path.with_name(KEY), key, 0)
        ledger = cls(path, promise, settings, _keyed(key, data), key)
        write_atomically(path, ledger._lines[0] + "\n")
        return ledger

    def _mend(self) -> None:
        """Drop a line that was not yet on disk when the run was killed, and count one that was."""
        if not self._whole:
            write_atomically(self.path, "\n".join(self._lines) + "\n")
            _write_key(self.path.with_name(KEY), self._key, len(self._lines) - 1)
            self._whole = True

    @property
    def paid(self) -> bool:
        """Whether anything was charged; where nothing was, no message has gone out."""
        return len(self._lines) > 1

    def keyed(self, sha256: str) -> str:
        """A hash of what is private, as it may lie in the run's folder: see `known_again`."""
        return _keyed(self._key, sha256.encode())

    def is_about(self, data: bytes) -> bool:
        """Whether these are the examples that it was begun for."""
        return self.data == _keyed(self._key, data)

    def _coded(self, content: Mapping[str, Any]) -> str:
        """A line with its code, which goes on from the last one's."""
        before = json.loads(self._lines[-1])["code"] if self._lines else ""
        return json.dumps({**content, "code": _keyed(self._key, f"{before}{json.dumps(content)}".encode())})

    def _is_as_written(self) -> bool:
        lines, self._lines = self._lines, []
        for line in lines:
            content = json.loads(line)
            content.pop("code", None)
            if self._coded(content) != line:
                break
            self._lines.append(line)
        found, self._lines = self._lines == lines, lines
        return found

    def affords(self, account: int) -> bool:
        """Whether one more round of an account stays within the promise."""
        promise, after = self.promise, self.spent[account] + self.promise.steps[account]
        if promise.target is None or (promise.planned and after <= promise.planned[account]):
            return True
        return within(promise.releases(account, after), promise.delta, promise.target)

    def charge(self, server_round: int, accounts: Sequence[int]) -> None:
        """Write down that a round is about to release something of these accounts; on disk when this returns."""
        self._mend()
        line = self._coded({"round": server_round, "accounts": list(accounts)})
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        _write_key(self.path.with_name(KEY), self._key, len(self._lines) - 1)
        for account in accounts:
            self.spent[account] += self.promise.steps[account]

    def mark(self) -> dict[str, Any]:
        """Where the ledger stands, for a checkpoint."""
        return {"lines": len(self._lines), "sha256": _sha256(self._lines)}

    def check(self, mark: Mapping[str, Any]) -> None:
        """Raise InputError where what a checkpoint has seen is not in the ledger any more."""
        if len(self._lines) < mark["lines"] or _sha256(self._lines[: mark["lines"]]) != mark["sha256"]:
            raise InputError(
                f"--resume: {self.path} has lost or changed lines since the last checkpoint, so nobody knows what is "
                f"spent; {BRING_BACK}"
            )


def known_again(folder: Path, sha256: str) -> str | None:
    """What a private run's checkpoints have in place of a hash of its data, which would confirm a guess at them.

    None where the folder has no key. Raises InputError for a key that cannot be read.
    """
    found = _read_key(folder / KEY)
    return None if found is None else _keyed(found[0], sha256.encode())


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _keyed(key: bytes, content: bytes) -> str:
    return hashlib.blake2b(content, key=key, digest_size=16).hexdigest()


def _write_key(path: Path, key: bytes, charges: int) -> None:
    write_atomically(path, json.dumps({"key": key.hex(), "charges": charges}) + "\n", mode=0o600)


def _read_key(path: Path) -> tuple[bytes, int] | None:
    """(the key, charges that have gone out or are about to); None where there is none."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return bytes.fromhex(found["key"]), int(found["charges"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--resume: {path} cannot be read ({error}); {BRING_BACK}") from error
