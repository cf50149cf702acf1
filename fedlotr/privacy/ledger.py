"""What a run has spent of its clients' privacy: a file that only grows, written before anything is released.

Its first line is what was promised when the run began; every other line is charged before the messages of a round go
out, and is on disk by then. So a run that is killed and resumed charges a repeated round again, and forgets none.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlotr.errors import InputError
from fedlotr.files import write_atomically
from fedlotr.privacy.accounting import Releases, epsilon

NAME = "privacy.jsonl"


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

    def __init__(self, path: Path, promise: Promise, charges: Sequence[str] = ()) -> None:
        """See `open`; charges: the lines after the first, as they stand in the file."""
        self.path, self.promise = path, promise
        self._lines = [json.dumps(asdict(promise)), *charges]
        self.spent = [0] * len(promise.rates)
        """Steps of each account."""
        for line in charges:
            for account in json.loads(line)["accounts"]:
                self.spent[account] += promise.steps[account]

    @classmethod
    def open(cls, path: Path) -> "Ledger | None":
        """The ledger of a run that goes on; None where it has none. Raises InputError where it cannot be read."""
        if not path.exists():
            return None
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        try:
            lines = whole.decode().split("\n")
            ledger = cls(path, Promise(**json.loads(lines[0])), lines[1:])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"--resume: {path} cannot be read ({error}), and without it nobody knows what is spent; bring it back "
                "from a copy, or start a new run with another --out"
            ) from error
        if torn:  # a line that was not yet on disk when the run was killed: its round had released nothing
            write_atomically(path, whole + b"\n")
        return ledger

    @classmethod
    def begin(cls, path: Path, promise: Promise) -> "Ledger":
        """The ledger of a new run."""
        ledger = cls(path, promise)
        write_atomically(path, ledger._lines[0] + "\n")
        return ledger

    def affords(self, account: int) -> bool:
        """Whether one more round of an account stays within the promise."""
        promise, after = self.promise, self.spent[account] + self.promise.steps[account]
        if promise.target is None or (promise.planned and after <= promise.planned[account]):
            return True
        return epsilon(promise.releases(account, after), promise.delta) <= promise.target

    def charge(self, server_round: int, accounts: Sequence[int]) -> None:
        """Write down that a round is about to release something of these accounts; on disk when this returns."""
        line = json.dumps({"round": server_round, "accounts": list(accounts)})
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        for account in accounts:
            self.spent[account] += self.promise.steps[account]

    def mark(self) -> dict[str, Any]:
        """Where the ledger stands, for a checkpoint."""
        return {"lines": len(self._lines), "sha256": _sha256(self._lines)}

    def check(self, mark: dict[str, Any]) -> None:
        """Raise InputError where what a checkpoint has seen is not in the ledger any more."""
        if len(self._lines) < mark["lines"] or _sha256(self._lines[: mark["lines"]]) != mark["sha256"]:
            raise InputError(
                f"--resume: {self.path} has lost or changed lines since the last checkpoint, so nobody knows what is "
                "spent; bring it back from a copy, or start a new run with another --out"
            )


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
