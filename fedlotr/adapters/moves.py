"""The table of ways in which bases move on between rounds, and the words of `--rebase`; it imports nothing heavy."""

from dataclasses import dataclass
from typing import Any, Literal

from fedlotr.adapters.kinds import Named
from fedlotr.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where the next pair of factors comes from.

    make: a `bases.Request` -> its `bases.Factors`. made_of: what the request's matrices are: none, the members' frozen
    weights W, the weights with what they carry (W + U V), or the gradient at the present model on public rows. Or the
    "product" B A itself, which is not folded but stays in the factors, turned: make is then of (A, B). Or the "start":
    nothing is made, trained factors are again what they began as.
    in_turn: it takes the singular vectors that follow those of the version before.
    """

    text: str
    make: Any
    made_of: Literal["seed", "weights", "present", "gradient", "product", "start"]
    in_turn: bool = False

    @property
    def makes_bases(self) -> bool:
        """Whether a pair is made anew, between which all go on."""
        return self.made_of not in ("product", "start")

    @property
    def derivable(self) -> bool:
        """Whether clients make it by themselves of what they have, so that nothing of it is sent."""
        return self.made_of != "gradient"


SPECTRAL = Named("fedlotr.adapters.bases:spectral_basis")
SKETCHED = Named("fedlotr.adapters.bases:sketched_basis")
MOVES: dict[str, Move] = {
    "gradient": Move(
        text="leading singular vectors of the gradient at the present model, on the public examples; they are sent",
        make=SKETCHED,
        made_of="gradient",
    ),
    "svd": Move(
        text="the singular vectors of the frozen weights, the next ones each time", make=SPECTRAL, made_of="weights",
        in_turn=True,
    ),
    "residual": Move(
        text="leading singular vectors of the weights with all that was folded into them", make=SKETCHED,
        made_of="present",
    ),
    "random": Move(
        text="orthonormal, drawn from the seed and the version", make=Named("fedlotr.adapters.bases:random_basis"),
        made_of="seed",
    ),
    "product": Move(
        text="the singular vectors of what was learnt, which is not folded: B A = U Σ Vᵀ, A is Vᵀ, B goes on from U Σ",
        make=Named("fedlotr.adapters.bases:product_basis"), made_of="product",
    ),
    "start": Move(
        text="none: factors that are both trained start again where they began", make=None, made_of="start",
    ),
}  # fmt: skip
"""What `--rebase T:HOW` may say. All but the first cost no byte."""


@dataclass(frozen=True)
class Rebase:
    """After every so many rounds the bases move, by the name of a `Move`."""

    every: int
    how: str

    @property
    def move(self) -> Move:
        """The entry."""
        return MOVES[self.how]

    def versions(self, rounds: int) -> int:
        """How often bases have moved before the round that follows so many."""
        return rounds // self.every


def read_rebase(given: str) -> Rebase:
    """T[:HOW]. Raises ValueError."""
    every, colon, how = given.partition(":")
    if not every.isdecimal() or not int(every) or bool(colon) != bool(how):
        raise ValueError("expected T or T:HOW, T being after how many rounds bases move, such as '4:gradient'")
    if how and how not in MOVES:
        raise ValueError(f"{how!r} is no way to move{nearest(how, MOVES)}")
    return Rebase(int(every), how or next(iter(MOVES)))


def check_rebase(given: str) -> str:
    """Raises ValueError as `read_rebase` does."""
    read_rebase(given)
    return given
