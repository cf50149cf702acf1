"""The table of methods: each is a point in the grid basis × tie × core × what is trained, never a class of its own.

An adapted layer computes `y = W x + s·B C A x`; a row says where B and A come from, who shares them, and which of
the three factors a client trains. Adding a method is adding a row. This module imports nothing heavy, so that the
command line can list its choices at once.
"""

from dataclasses import dataclass
from typing import Literal

Factor = Literal["A", "B", "C"]

BASES: dict[str, str] = {
    "random": "orthonormal, drawn from the seed",
    "svd": "leading singular vectors of the frozen weights",
    "update": "leading singular vectors of the first step of full fine-tuning, from the public examples",
    "lora": "A Kaiming-uniform, B zero (LoRA's own start)",
}
"""Where the factors B and A come from."""

TIES: dict[str, str] = {
    "layer": "each adapted matrix has its own B and A",
    "type": "all layers of one projection type share one pair",
}
"""Who shares B and A."""


@dataclass(frozen=True)
class Method:
    """One row.

    train: the factors that move on the client; those not named are frozen and equal on every client. Without "C"
    the core is the identity; without any factor no layer is adapted and only the classification head moves.
    strategy: how the server combines the updates unless told otherwise.
    lr, head_lr: default learning rates of AdamW, for the factors and for the classification head, under the cosine
    schedule; `experiments/README.md` tells how they were chosen (that of `lora` was not searched for).
    """

    title: str
    paper: str
    basis: str
    tie: str
    train: tuple[Factor, ...]
    strategy: str
    lr: float
    head_lr: float

    @property
    def has_core(self) -> bool:
        """Whether clients train an r×r core between frozen factors."""
        return "C" in self.train

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
        head_lr=3e-2,
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
    "lora": Method(
        "both factors of LoRA, averaged apart",
        "Hu et al. 2021, LoRA; Zhang et al. 2023, FedIT",
        basis="lora",
        tie="layer",
        train=("A", "B"),
        strategy="fedit",
        lr=2e-3,
        head_lr=3e-2,
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
