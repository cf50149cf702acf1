"""The table of methods: each is a point in the grid basis × tie × core × what is trained, never a class of its own.

An adapted layer computes `y = W x + s·B C A x`; a row says where B and A come from, who shares them, and which of
the three factors a client trains. One row, `full`, has no factors: it trains a matrix D of `y = W x + D x`. Adding a
method is adding a row. This module imports nothing heavy, so that the command line can list its choices at once.
"""

from dataclasses import dataclass
from typing import Literal

from fedlotr.adapters.kinds import BASES, CORES, BasisKind, CoreKind

Factor = Literal["A", "B", "C", "D"]


@dataclass(frozen=True)
class Method:
    """One row.

    train: the factors that move on the client; those not named are frozen and equal on every client. Without any
    factor no layer is adapted and only the classification head moves.
    publish: of those the factors that leave the client; the others stay with it from round to round, each client's its
    own. None: all leave it.
    alpha: of s = alpha / r, unless told otherwise; None: s = 1.
    core: what C is. rebase: how the bases move unless told otherwise, in the words of `--rebase`.
    residual: a trained B starts at its basis too, not at zero, and what both multiply to is taken off beside W.
    turns: where not empty, the factors that move and are sent in each round, in turn.
    strategy: how the server combines the updates unless told otherwise.
    lr, head_lr: default learning rates of AdamW, for the factors and for the classification head, under the cosine
    schedule; `experiments/README.md` tells how those of fed-sb, lotr and lora-xs were chosen. No other row's were
    searched for.
    """

    title: str
    paper: str
    basis: str
    tie: str
    train: tuple[Factor, ...]
    strategy: str
    lr: float
    head_lr: float
    core: str = "full"
    alpha: float | None = None
    turns: tuple[tuple[Factor, ...], ...] = ()
    publish: tuple[Factor, ...] | None = None
    rebase: str | None = None
    residual: bool = False

    def basis_kind(self, other: str | None = None) -> BasisKind:
        """The entry of its basis, or of another one in its place."""
        return BASES[other or self.basis]

    def core_kind(self, other: str | None = None) -> CoreKind:
        """The entry of its core, or of another one in its place."""
        return CORES[other or self.core]

    @property
    def personal(self) -> frozenset[Factor]:
        """The trained factors that stay with the client."""
        return frozenset() if self.publish is None else frozenset(self.train) - frozenset(self.publish)

    @property
    def sent(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors that clients send: once, or of each round in turn."""
        return tuple(tuple(f for f in turn if f not in self.personal) for turn in self.turns or (self.train,))

    @property
    def has_core(self) -> bool:
        """Whether clients train an r×r core between frozen factors."""
        return "C" in self.train

    @property
    def both(self) -> bool:
        """Whether A and B are all that clients train of a layer, and both are sent in every round."""
        return set(self.train) == {"A", "B"} and not self.turns and not self.personal

    @property
    def freezes(self) -> bool:
        """Whether a pair of frozen factors stands in the layers: A, B or both do not move."""
        return self.factored and not {"A", "B"} <= set(self.train)

    @property
    def may_tie(self) -> bool:
        """Whether layers may share A and B: frozen ones around a core, or trained ones where it is made for that."""
        return self.has_core and (self.freezes or self.tie != "layer")

    def moving(self, server_round: int) -> tuple[Factor, ...]:
        """The factors that clients train and send in a round, counted from 1."""
        return self.turns[(server_round - 1) % len(self.turns)] if self.turns else self.train

    @property
    def factored(self) -> bool:
        """Whether B and A stand in the layers, of some rank: not so for a whole matrix, nor for the head alone."""
        return self.adapts and "D" not in self.train

    @property
    def adapts(self) -> bool:
        """Whether any layer is adapted at all."""
        return bool(self.train)


METHODS: dict[str, Method] = {
    "fed-sb": Method(
        "cores between the leading singular vectors of the first full fine-tuning step",
        "Singhal et al. 2025, Fed-SB",
        basis="update",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=1e-1,
    ),
    "lotr": Method(
        "a core per layer between factors shared by all layers of a type",
        "Bershatsky et al. 2024, LoTR (cores only)",
        basis="random",
        tie="type",
        train=("C",),
        strategy="exact-average",
        lr=2e-2,
        head_lr=3e-2,
    ),
    "lotr-trained": Method(
        "LoTR as it was published: the core of each layer, and the factors that all layers of a type share",
        "Bershatsky et al. 2024, LoTR",
        basis="normal",
        tie="type",
        train=("A", "B", "C"),
        strategy="fedit",
        lr=2e-3,
        head_lr=3e-2,
        alpha=1.0,
    ),
    "lora-xs": Method(
        "cores between the leading singular vectors of the frozen weights",
        "Bałazy et al. 2024, LoRA-XS",
        basis="svd",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=2e-2,
        head_lr=3e-2,
    ),
    "lotr-tucker": Method(
        "a core per layer between the Tucker-2 factors of a type's stacked weights",
        "Bershatsky et al. 2024, LoTR (cores only)",
        basis="tucker",
        tie="type",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
    ),
    "lotr-sb": Method(
        "a core per layer between the Tucker-2 factors of a type's stacked first steps",
        "ours: LoTR's sharing with LoRA-SB's subspace",
        basis="update",
        tie="type",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
    ),
    "ravan": Method(
        "four small cores a layer, each with a scale of its own, between random factors",
        "Raje et al. 2025, RAVAN",
        basis="random",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
        core="heads",
    ),
    "loldu": Method(
        "a diagonal between the triangular factors of the frozen weights",
        "Shi et al. 2024, LoLDU",
        basis="ldu",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
        core="diag",
    ),
    "int-tune": Method(
        "cores between the first columns and rows of the frozen weights (Nyström)",
        "Guo et al. 2025, NLoRA (IntTune)",
        basis="nystrom",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
    ),
    "tiny-lora": Method(
        "a few numbers a layer that mix seeded cores between the weights' singular vectors",
        "Morris et al. 2026, TinyLoRA; Koohpayegani et al. 2024, NOLA",
        basis="svd",
        tie="layer",
        train=("C",),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
        core="mix",
    ),
    "lora": Method(
        "both factors of LoRA, averaged apart",
        "Hu et al. 2021, LoRA; Zhang et al. 2023, FedIT",
        basis="lora",
        tie="layer",
        train=("A", "B"),
        strategy="fedit",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
    ),
    "ffa-lora": Method(
        "LoRA's B alone; A stays as it was drawn",
        "Sun et al. 2024, FFA-LoRA",
        basis="lora",
        tie="layer",
        train=("B",),
        strategy="ffa-lora",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
    ),
    "fedsvd": Method(
        "LoRA's B alone; after every round A becomes the right singular vectors of their product",
        "Lee et al. 2025, FedSVD",
        basis="lora",
        tie="layer",
        train=("B",),
        strategy="ffa-lora",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
        rebase="1:product",
    ),
    "frlora": Method(
        "LoRA whose mean is folded after every round; it starts again from the weights' leading singular vectors",
        "Yan et al. 2025, FRLoRA",
        basis="svd-root",
        tie="layer",
        train=("A", "B"),
        strategy="fedit",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
        rebase="1:start",
        residual=True,
    ),
    "rolora": Method(
        "LoRA's B in odd rounds, its A in even ones",
        "Chen et al. 2025, RoLoRA",
        basis="lora",
        tie="layer",
        train=("A", "B"),
        strategy="rolora",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
        turns=(("B",), ("A",)),
    ),
    "full": Method(
        "every number of every adapted layer, as a matrix beside it: the ceiling, for small models",
        "McMahan et al. 2017, FedAvg",
        basis="random",
        tie="layer",
        train=("D",),
        strategy="exact-average",
        lr=1e-4,
        head_lr=3e-2,
        core="identity",
    ),
    "fedsa-lora": Method(
        "LoRA whose A is averaged; each client's B is its own and stays with it",
        "Guo et al. 2024, FedSA-LoRA",
        basis="lora",
        tie="layer",
        train=("A", "B"),
        strategy="fedsa",
        lr=2e-3,
        head_lr=3e-2,
        core="identity",
        publish=("A",),
    ),
    "personal-core": Method(
        "A and B averaged, and between them a core of each client's own that stays with it",
        "ours: FedSA-LoRA's split, with the core as the part that stays",
        basis="random",
        tie="layer",
        train=("A", "B", "C"),
        strategy="fedsa",
        lr=2e-3,
        head_lr=3e-2,
        publish=("A", "B"),
    ),
    "head": Method(
        "only the classification head: the honest floor",
        "",
        basis="random",
        tie="layer",
        train=(),
        strategy="exact-average",
        lr=1e-2,
        head_lr=3e-2,
    ),
}
