"""The tables of bases, ties and cores: an entry says all there is to say of one, to whoever asks.

An entry names its function as `module:name`, so that the command line, `fedlotr ls`, `cost` and the configuration read
these tables without anything heavy. Adding a basis or a core is adding its function and its entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, Literal

BLOCKS = 4
"""Of the core `heads`, as in RAVAN's experiments."""
MIXED = 64
"""Matrices that the core `mix` combines, at most: the number that PEFT's TinyLoRA takes."""


@dataclass(frozen=True)
class Named:
    """The function `module:name`, imported when it is first called."""

    path: str

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        return _found(self.path)(*arguments)


@cache
def _found(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


@dataclass(frozen=True, kw_only=True)
class BasisKind:
    """Where a pair of factors B and A comes from.

    make: a `bases.Request` -> its `bases.Factors`. made_of: what the request's matrices are: none, the members' frozen
    weights, or the first steps of full fine-tuning, by the gradient on public examples.
    zero_b: B starts at zero, so nothing learns until B moves. unit: A's rows and B's columns have length one, so that
    `--basis-codec` can tell them in few bits. one_layer: made of one layer's weights, never a tie's.
    """

    text: str
    make: Callable[[Any], Any]
    made_of: Literal["seed", "weights", "gradient"]
    zero_b: bool = False
    unit: bool = False
    one_layer: bool = False

    @property
    def derivable(self) -> bool:
        """Whether clients make it by themselves, so that a seed and a hash are sent instead of the factors."""
        return self.made_of != "gradient"


BASES: dict[str, BasisKind] = {
    "random": BasisKind(
        text="orthonormal, drawn from the seed", make=Named("fedlotr.adapters.bases:random_basis"), made_of="seed"
    ),
    "normal": BasisKind(
        text="every number from N(0, 1), as LoTR's published code has them (not orthonormal)",
        make=Named("fedlotr.adapters.bases:normal_basis"),
        made_of="seed",
    ),
    "svd": BasisKind(
        text="leading singular vectors of the frozen weights",
        make=Named("fedlotr.adapters.bases:spectral_basis"),
        made_of="weights",
    ),
    "svd-scaled": BasisKind(
        text="U and Σ Vᵀ of the frozen weights, as LoRA-XS's published code has them (not orthonormal)",
        make=Named("fedlotr.adapters.bases:scaled_svd_basis"),
        made_of="weights",
        one_layer=True,
    ),
    "svd-root": BasisKind(
        text="U √Σ and √Σ Vᵀ of the frozen weights, as PEFT's TinyLoRA has them (not orthonormal)",
        make=Named("fedlotr.adapters.bases:root_svd_basis"),
        made_of="weights",
        one_layer=True,
    ),
    "update": BasisKind(
        text="leading singular vectors of the first step of full fine-tuning, from the public examples",
        make=Named("fedlotr.adapters.bases:spectral_basis"),
        made_of="gradient",
        unit=True,
    ),
    "lora": BasisKind(
        text="A Kaiming-uniform, B zero (LoRA's own start)",
        make=Named("fedlotr.adapters.bases:lora_basis"),
        made_of="seed",
        zero_b=True,
    ),
    "nystrom": BasisKind(
        text="the first rows and columns of the frozen weights (not orthonormal)",
        make=Named("fedlotr.adapters.bases:nystrom_basis"),
        made_of="weights",
        one_layer=True,
    ),
    "ldu": BasisKind(
        text="the unit triangular factors of the frozen weights (not orthonormal)",
        make=Named("fedlotr.adapters.bases:ldu_basis"),
        made_of="weights",
        one_layer=True,
    ),
    "tucker": BasisKind(
        text="the Tucker-2 decomposition of the frozen weights of a tie, stacked",
        make=Named("fedlotr.adapters.bases:tucker_basis"),
        made_of="weights",
    ),
}
"""Where the factors B and A come from. The first that is made of something is what a message proposes, or a private run
takes, where one made of something else cannot be had."""


def bases_made_of(made_of: str) -> list[str]:
    """The names of the bases that are made of it."""
    return [name for name, kind in BASES.items() if kind.made_of == made_of]


TIES: dict[str, str] = {
    "layer": "each adapted matrix has its own B and A",
    "type": "all layers of one projection type share one pair",
    "all": "all adapted layers share one pair; they must have one shape",
}
"""Who shares B and A."""

AS_TRAINED = Named("fedlotr.adapters.cores:as_trained")


@dataclass(frozen=True, kw_only=True)
class CoreKind:
    """What C between the factors is made of: tensors θ that are trained, "C" and perhaps "S", and a constant P.

    "C" starts at zero, so that the first forward is the base model's, and leaves the client; "S" stays there and starts
    at one in every round. In all functions θ may have any leading copies axes.

    shapes: r -> the shapes of θ. expand: (θ, P) -> C (..., r, r), linear in what is published. recover: (C (r, r), P)
    -> the "C" of which expand makes that, or something near it, scales being one. publish: θ -> what leaves the client,
    "C" in its own shape. constant: (r, seed, tie's name) -> P, made again wherever it is needed; it belongs to frozen
    factors.
    numbers, source: those of a layer that travel, as people write them, and who says so.
    blocks: r must be a multiple of it. nested: a client of rank k has the leading block, C[:k] or C[:k, :k].
    """

    text: str
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]]
    numbers: str = "0"
    source: str = ""
    expand: Callable[[Mapping[str, Any], Any], Any] = AS_TRAINED
    recover: Callable[[Any, Any], Any] | None = None
    publish: Callable[[Mapping[str, Any]], Mapping[str, Any]] = Named("fedlotr.adapters.cores:core_alone")
    constant: Callable[[int, int, str], Any] | None = None
    blocks: int = 1
    nested: bool = False

    @property
    def trained(self) -> bool:
        """Whether there is anything to train: if not, C is the identity."""
        return bool(self.shapes(self.blocks))

    @property
    def restarts(self) -> bool:
        """Whether a part of it starts again in every round, so that no gradient of it lasts."""
        return "S" in self.shapes(self.blocks)

    @property
    def plain(self) -> bool:
        """Whether C is a matrix that is trained as it is, or nothing."""
        return self.expand == AS_TRAINED

    def count(self, r: int) -> int:
        """Numbers of a layer that travel."""
        return prod(self.shapes(r)["C"])


CORES: dict[str, CoreKind] = {
    "full": CoreKind(
        text="r×r numbers",
        shapes=lambda r: {"C": (r, r)},
        numbers="r²",
        source="Singhal et al. 2025, Fed-SB; Bałazy et al. 2024, LoRA-XS",
        recover=Named("fedlotr.adapters.cores:recover_whole"),
        nested=True,
    ),
    "diag": CoreKind(
        text="the diagonal: r numbers",
        shapes=lambda r: {"C": (r,)},
        numbers="r",
        source="Shi et al. 2024, LoLDU",
        expand=Named("fedlotr.adapters.cores:expand_diagonal"),
        recover=Named("fedlotr.adapters.cores:recover_diagonal"),
        nested=True,
    ),
    "heads": CoreKind(
        text="four blocks of r/4 × r/4 with a trainable scale each; the products are published",
        shapes=lambda r: {"C": (BLOCKS, r // BLOCKS, r // BLOCKS), "S": (BLOCKS,)},
        numbers="r²/4",
        source="Raje et al. 2025, RAVAN: h blocks of (r/h)², h = 4",
        expand=Named("fedlotr.adapters.cores:expand_heads"),
        recover=Named("fedlotr.adapters.cores:recover_heads"),
        publish=Named("fedlotr.adapters.cores:publish_heads"),
        blocks=BLOCKS,
    ),
    "mix": CoreKind(
        text="a combination of at most 64 seeded r×r matrices",
        shapes=lambda r: {"C": (min(MIXED, r * r),)},
        numbers="min(64, r²)",
        source="Morris et al. 2026, TinyLoRA",
        expand=Named("fedlotr.adapters.cores:expand_mix"),
        recover=Named("fedlotr.adapters.cores:recover_mix"),
        constant=Named("fedlotr.adapters.cores:mixed_matrices"),
    ),
    "identity": CoreKind(text="nothing between B and A", shapes=lambda r: {}),
}
"""What stands between B and A."""


def cores_that(are: Callable[[CoreKind], bool]) -> list[str]:
    """The names of the cores of which it is true."""
    return [name for name, kind in CORES.items() if are(kind)]
