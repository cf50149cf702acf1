"""How rounds go in virtual time: whom the server waits for, and what an update counts that is of an older model.

Virtual seconds are reckoned, never measured: the same seed gives the same rounds on any machine, with any workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlotr.fleet.fleet import Fleet
from fedlotr.fleet.modes import MODES, Staleness


@dataclass(frozen=True, kw_only=True)
class VirtualTime:
    """A run in virtual time.

    mode: one of `MODES`. fleet: who is there, and how fast. operations: of each client's training in one round.
    asked: clients in a round; in async, that train at the same time. wanted: updates that a round is done with; in
    sync and at a deadline, as many as come. deadline: seconds. keep_late: whether what comes after is used later.
    staleness: what such updates count; discount: its words. mixing: FedAsync's alpha; None: an update is a change, as
    FedBuff has it.
    """

    mode: str
    fleet: Fleet
    operations: Sequence[float]
    asked: int
    wanted: int
    staleness: Staleness
    discount: str
    deadline: float = math.inf
    keep_late: bool = False
    mixing: float | None = None

    @property
    def stale(self) -> bool:
        """Whether updates may have been trained on an older model."""
        return MODES[self.mode].stale or self.keep_late

    def in_words(self) -> str:
        """How rounds go, for the header of a run."""
        waits = {
            "sync": f"{self.asked:,} are asked, and a round waits for all of them",
            "deadline": f"{self.asked:,} are asked, and a round is over after {self.deadline:g} virtual seconds",
            "over-select": f"{self.asked:,} are asked, and the first {self.wanted:,} to answer are a round",
            "async": f"{self.asked:,} train at the same time, and the next {self.wanted:,} updates are a round",
        }[self.mode]
        late = ""
        if self.stale:
            mixed = "" if self.mixing is None else f", a client's model is mixed in by {self.mixing:g}"
            late = f"; older updates count by {self.discount}{mixed}"
        elif MODES[self.mode].may_be_late:
            late = "; later updates are dropped"
        return f"{self.mode}: {waits}{late}"
