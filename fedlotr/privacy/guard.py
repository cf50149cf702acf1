"""What stands between the clients and whatever is published of them: who may take part, what it costs, what is seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedlotr.privacy.accounting import Releases, dearest, epsilon, epsilon_by_prv, epsilon_by_rdp, rough
from fedlotr.privacy.clipping import clip_factors, clipped
from fedlotr.privacy.ledger import Ledger
from fedlotr.privacy.noise import NoiseStream
from fedlotr.reporting.documents import Privacy, PrivacyInWords

Arrays = Mapping[str, npt.NDArray[np.float64]]

CLIP_RATE = 0.2
"""How fast an adaptive bound moves: η_C of Andrew et al. 2021, as they recommend."""
COUNT_SHARE = 1 / 20
"""Of the expected cohort: the standard deviation of the noise on their count, σ_b of the same paper."""

REPRODUCIBLE = "the noise can be made again from the seed (--reproducible-noise), so it hides nothing"
SIMULATED = "the noise is that of a larger federation (--noise-cohort), so it hides less here"


class NoGuard:
    """Of a run that promises nothing: everybody may take part, and it costs nothing."""

    promises = False
    """Whether anything is hidden."""
    hides_clients = False
    """Whether the unit is a whole client: then the server, not the clients, clips and adds noise."""

    def admitted(self, clients: Sequence[int]) -> list[int]:
        """Those of a round's clients that can still pay for it."""
        return list(clients)

    def draw(self, server_round: int, admitted: Sequence[int] = ()) -> list[int]:
        """Who takes part, of those that can pay."""
        return list(admitted)

    def charge(self, server_round: int, clients: Sequence[int]) -> None:
        """To be called before anything that depends on these clients' data goes out."""

    def epsilon(self) -> float | None:
        """What the dearest account has spent; None where nothing may be claimed."""
        return None

    def in_words(self) -> str | None:
        """The promise in a line."""
        return None

    def keyed(self, digest: str) -> str:
        """A hash of the examples as a checkpoint may hold it."""
        return digest

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        return None

    def load_state(self, state: Any) -> None:
        """Go on from a checkpoint."""

    def summary(self) -> Privacy | None:
        """The promise and what became of it, for summary.json."""
        return None


class Guard(NoGuard):
    """Keeps the ledger of one run, and says what its promise amounts to."""

    promises = True

    def __init__(self, ledger: Ledger, facts: PrivacyInWords) -> None:
        self.ledger, self._facts = ledger, facts

    @override
    def admitted(self, clients: Sequence[int]) -> list[int]:
        return [client for client in clients if self.ledger.affords(client)]

    @override
    def keyed(self, digest: str) -> str:
        return self.ledger.keyed(digest)

    @override
    def charge(self, server_round: int, clients: Sequence[int]) -> None:
        if clients:
            self.ledger.charge(server_round, clients)

    def void(self) -> str | None:
        """Why no epsilon may be claimed, if so."""
        return REPRODUCIBLE if self.ledger.promise.reproducible else None

    @override
    def epsilon(self) -> float | None:
        return None if self.void() else self._dearest()[1]

    def _accounts(self) -> list[Releases]:
        return [self.ledger.promise.releases(account, steps) for account, steps in enumerate(self.ledger.spent)]

    def _dearest(self) -> tuple[Releases, float]:
        """What the dearest account has released, and its epsilon."""
        return dearest(self._accounts(), self.ledger.promise.delta)

    def _median(self) -> float:
        """The median account's epsilon. The order is a rough reckoning's: a PLD for each would take minutes."""
        delta = self.ledger.promise.delta
        return epsilon(
            sorted(self._accounts(), key=lambda spent: rough(spent, delta))[len(self.ledger.spent) // 2], delta
        )

    @override
    def in_words(self) -> str:
        promise = self.ledger.promise
        budget = "" if promise.target is None else f" at most {promise.target:g}"
        claim = self.void() or f"epsilon{budget} at delta {promise.delta:.2g}"
        return f"{promise.unit} level, {claim}; noise {promise.sigma:.3g} times the bound {self._facts['clip_norm']:g}"

    @override
    def state(self) -> dict[str, Any]:
        return self.ledger.mark()

    @override
    def load_state(self, state: Any) -> None:
        """Raises InputError where the ledger knows less than that."""
        self.ledger.check(state)

    @override
    def summary(self) -> Privacy:
        promise, void = self.ledger.promise, self.void()
        most, worst = self._dearest()
        return {
            "unit": promise.unit,
            "adjacency": "add or remove one example of one client"
            if promise.unit == "example"
            else "add or remove one client with all its examples",
            "epsilon": None if void else worst,
            "epsilon_reason": void,
            "epsilon_median": None if void else self._median(),
            "epsilon_budget": promise.target,
            "delta": promise.delta,
            "accountant": "dp-accounting, privacy loss distributions",
            "epsilon_by_rdp": None if void else epsilon_by_rdp(most, promise.delta),
            "epsilon_by_opacus_prv": None if void else epsilon_by_prv(most, promise.delta),
            "noise_multiplier": promise.sigma,
            "sampling": "Poisson",
            "sampling_rate": most.rate,
            "steps": most.steps,
            "noise": "ChaCha20, from the run's seed"
            if promise.reproducible
            else "ChaCha20, keys from the operating system",
            **self._facts,
        }


@dataclass
class Adaptive:
    """A bound that follows a quantile of the norms: Andrew et al. 2021 (arXiv:1905.03871), algorithm 1.

    quantile: γ, the share of updates that the bound is to let through whole.
    """

    quantile: float

    def count_noise(self, cohort: float, sigma: float) -> float:
        """σ_b: of the noise on the count; never so small that the rest of the budget could not pay for the sum."""
        return max(cohort * COUNT_SHARE, sigma)

    def sum_noise(self, cohort: float, sigma: float) -> float:
        """z_Δ = (z⁻² - (2 σ_b)⁻²)^(-1/2): with it, sum and count together cost what noise z on the sum would."""
        return float((sigma**-2 - (2 * self.count_noise(cohort, sigma)) ** -2) ** -0.5)

    def moved(self, bound: float, whole: float) -> float:
        """C · exp(-η (b - γ)): smaller where more updates than wanted are below it. whole: b, noised."""
        return float(bound * np.exp(-CLIP_RATE * (whole - self.quantile)))


class ClientGuard(Guard):
    """Client-level privacy on the server: McMahan et al. 2018 (arXiv:1710.06963), with cohorts of a random size.

    Every client is in a round with the same probability; updates are clipped; noise is added to their sum, which is
    divided by the *expected* cohort. Whatever the strategy does with that one mean tells nothing more.
    """

    def __init__(
        self,
        ledger: Ledger,
        facts: PrivacyInWords,
        clients: int,
        bound: float,
        seed: int,
        adaptive: Adaptive | None = None,
        noise_cohort: int | None = None,
    ) -> None:
        """bound: of an update's norm, at first. noise_cohort: the noise is that of a mean over so many clients."""
        super().__init__(ledger, facts)
        self.bound, self._adaptive, self._clients, self._seed = bound, adaptive, clients, seed
        self.cohort = ledger.promise.rates[0] * clients
        self._noise_cohort = noise_cohort
        self._stream: NoiseStream | None = None

    hides_clients = True

    @override
    def draw(self, server_round: int, admitted: Sequence[int] = ()) -> list[int]:
        """Drawn anew; it may be empty, and nobody can foretell it."""
        key = f"{self._seed}/client noise/{server_round}" if self.ledger.promise.reproducible else None
        self._stream = NoiseStream(key)
        return [int(client) for client in self._stream.chosen(self._clients, self.ledger.promise.rates[0])]

    @override
    def admitted(self, clients: Sequence[int]) -> list[int]:
        """All or none: there is one account."""
        return list(clients) if self.ledger.affords(0) else []

    @override
    def charge(self, server_round: int, clients: Sequence[int]) -> None:
        """A round costs all clients the same, whoever takes part."""
        self.ledger.charge(server_round, [0])

    def mean(self, start: Arrays, updates: Sequence[Arrays]) -> dict[str, npt.NDArray[np.float64]]:
        """start + (Σ clipped updates + noise) / expected cohort, by name; updates: the clients' tensors after training.

        To be called once for each `draw`.
        """
        stream, promise, cohort = self._stream, self.ledger.promise, self.cohort
        assert stream is not None
        self._stream = None
        totals = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in start.items()}
        whole = 0.0
        for update in updates:  # one after the other: all of them would not fit the memory where a round has thousands
            moved = {name: torch.from_numpy(np.asarray(update[name] - value))[None] for name, value in start.items()}
            for name, row in clipped(moved, self.bound).items():
                totals[name] += row[0]
            whole += float(clip_factors(moved, self.bound) >= 1.0) - 0.5
        sigma = promise.sigma if self._adaptive is None else self._adaptive.sum_noise(cohort, promise.sigma)
        scale = sigma * self.bound * (1.0 if self._noise_cohort is None else cohort / self._noise_cohort)
        released = {}
        for name, total in sorted(totals.items()):
            released[name] = start[name] + ((total + scale * stream.normal(total)) / cohort).numpy()
        if self._adaptive is not None:
            noise = self._adaptive.count_noise(cohort, promise.sigma) * float(stream.normal(torch.zeros(1)))
            self.bound = self._adaptive.moved(self.bound, (whole + noise) / cohort + 0.5)
        return released

    @override
    def void(self) -> str | None:
        return super().void() or (SIMULATED if self._noise_cohort is not None else None)

    @override
    def state(self) -> dict[str, Any]:
        return {**super().state(), "bound": self.bound}

    @override
    def load_state(self, state: Any) -> None:
        super().load_state(state)
        self.bound = state["bound"]

    @override
    def summary(self) -> Privacy:
        found: Privacy = {**super().summary(), "clip_norm": self.bound}
        if self._noise_cohort is not None:
            population = round(self._clients * self._noise_cohort / self.cohort)
            found["simulation"] = {
                "cohort": self._noise_cohort,
                "population": population,
                "epsilon": self._dearest()[1],
            }
        return found
