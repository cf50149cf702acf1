"""The factored layer `y = W x + s·B C A x`, with copies of its trained factors for clients and examples.

What the server has merged so far, and an adapter that a run starts from, stand beside W as a constant: the carried
term of `y = W x + s·B C A x + U V x`.

While training, a trained factor may carry leading axes, (K,) for K clients or (K, b) for b examples of each: the rows
of the input are then K (or K·b) equal groups in that order, and each group meets its own copy. The frozen base is
shared by all of them, so K clients train in one forward and one backward. Tokens that are packed without padding
come in spans of any length, one for each client (`adapters.packed`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.kinds import CoreKind
from fedlotr.adapters.packed import Spans, add_update, current_spans, factored_linear
from fedlotr.adapters.prepared import forget, linear
from fedlotr.adapters.quantised import dequantised, is_quantised

FACTORS = ("A", "C", "B")
"""In the order in which they meet the input."""
TRAINABLE = "ABCDS"
"""The letters of all that can be trained of a layer."""
PIECE = 1024
"""Tokens of which an update is there at once, where nothing is trained: in float32 it is twice what the base makes."""


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x Wᵀ + b` with one weight, or one for each equal group of rows.

    x: (rows, ..., d_in). weight: (d_out, d_in) or (*groups, d_out, d_in); bias: (d_out,) or (*groups, d_out).
    Raises ValueError where the groups do not divide the rows.
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    d_out, d_in = weight.shape[-2:]
    stacked = weight.reshape(-1, d_out, d_in)
    if x.shape[0] % stacked.shape[0]:
        raise ValueError(f"{x.shape[0]} rows cannot be shared out evenly among {stacked.shape[0]} copies")
    grouped = x.reshape(stacked.shape[0], -1, d_in)
    y = torch.bmm(grouped, stacked.transpose(1, 2))
    if bias is not None:
        y = y + bias.reshape(-1, 1, d_out)
    return y.reshape(*x.shape[:-1], d_out)


def low_rank(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`U V x` in the dtype of the pair. x: (..., d_in), v: (k, d_in), u: (d_out, k)."""
    return F.linear(F.linear(x.to(v.dtype), v), u)


class CopiesLinear(nn.Linear):
    """A linear layer (of a classification head) whose weight and bias may carry the copies axes."""

    copies: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def around(cls, linear: nn.Linear) -> "CopiesLinear":
        """The same parameters, in a layer that takes copies."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out), in the weight's dtype: the base below may be narrower."""
        x = input.to(self.weight.dtype)
        if self.copies is None:
            return super().forward(x)
        return grouped_linear(x, self.copies["weight"], self.copies.get("bias"))


class Basis(nn.Module):
    """A pair of frozen factors; one object for all layers of a tie, so that casting or copying never unties them."""

    A: torch.Tensor
    B: torch.Tensor

    P: torch.Tensor | None

    def __init__(self, d_in: int, d_out: int, r: int, *, persistent: bool, mixed: torch.Tensor | None = None) -> None:
        super().__init__()
        # The seeded matrices of a core that mixes them, made again from the seed wherever they are needed.
        self.register_buffer("P", mixed, persistent=False)
        # NaN until filled or loaded: a basis that was forgotten shows in the first output.
        self.register_buffer("A", torch.full((r, d_in), torch.nan), persistent=persistent)
        self.register_buffer("B", torch.full((d_out, r), torch.nan), persistent=persistent)


class Carried(nn.Module):
    """A constant beside W in float32: the pair V (as A) and U (as B), or the matrix (d_out, d_in) itself."""

    A: torch.Tensor
    B: torch.Tensor
    W: torch.Tensor

    def __init__(self, *tensors: torch.Tensor) -> None:
        """V (k, d_in) and U (d_out, k), or one matrix."""
        super().__init__()
        self.dense = len(tensors) == 1
        for name, tensor in zip(("W",) if self.dense else ("A", "B"), tensors, strict=True):
            self.register_buffer(name, tensor.detach().float(), persistent=False)
        self._narrow: tuple[torch.Tensor, ...] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`U V x` in the dtype of x, which is the base's: one product more in float32 would take as long as four."""
        if self._narrow is None or (self._narrow[0].dtype, self._narrow[0].device) != (x.dtype, x.device):
            with torch.inference_mode(False):  # who first needs them may only score, and others train with them
                self._narrow = tuple(t.to(x.dtype) for t in ((self.W,) if self.dense else (self.A, self.B)))
        return F.linear(x, *self._narrow) if self.dense else low_rank(x, *self._narrow)

    def matrix(self) -> torch.Tensor:
        """U V (d_out, d_in), multiplied in float64."""
        return self.W.double() if self.dense else self.B.double() @ self.A.double()


class FactoredLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer (`nn.Linear`, `Conv1D`, quantised) with `s·B C A` beside it.

    Or with a trained matrix D: `W x + D x`, and no factors.

    Per adapter: `core_A`, `core_B`, `core_C`, `core_D` hold what is trained as parameters (`core_C` and `core_S` those
    that the core's `expand` makes C of), `core_basis` the frozen factors, `core_carry` the carried term. The base layer
    is called, never read, except to merge.
    """

    adapter_layer_names = tuple(f"core_{name}" for name in TRAINABLE)
    other_param_names = ("core_basis", "core_carry", "scaling", "r", "core")

    copies: Mapping[str, torch.Tensor] | None = None
    """Copies of the active adapter's trained factors, by name "A", "B", "C", "D" or "S"; see `copies`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.core_A = nn.ParameterDict()
        self.core_B = nn.ParameterDict()
        self.core_C = nn.ParameterDict()
        self.core_D = nn.ParameterDict()
        self.core_S = nn.ParameterDict()
        self.core_basis = nn.ModuleDict()
        self.core: dict[str, CoreKind] = {}
        self.core_carry = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = widths(base_layer)

    def add(
        self,
        adapter: str,
        *,
        r: int,
        scaling: float,
        basis: Basis | None,
        parameters: Mapping[str, torch.Tensor],
        core: CoreKind,
    ) -> None:
        """Put an adapter beside the base: its frozen pair (or None), its trained tensors by name, and what C is.

        A parameter among the tensors is another layer's, which this one shares.
        """
        self.r[adapter], self.scaling[adapter], self.core[adapter] = r, scaling, core
        device = next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))
        if basis is not None:
            self.core_basis[adapter] = basis.to(device)
        for name, value in parameters.items():
            # Only the device follows the base: cast to its dtype, orthonormal factors would be rounded.
            self._parameters_of(name)[adapter] = (
                value if isinstance(value, nn.Parameter) else nn.Parameter(value.to(device))
            )

    def add_carry(self, adapter: str, *tensors: torch.Tensor) -> None:
        """Let an adapter contain a constant `U V x`, instead of the one it had; tensors: as `Carried` takes them."""
        device = next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))
        self.core_carry[adapter] = Carried(*tensors).to(device)

    def drop_carry(self, adapter: str) -> None:
        """Let an adapter contain no constant."""
        if adapter in self.core_carry:
            del self.core_carry[adapter]

    def carry(self, adapter: str) -> Carried | None:
        """The carried term of an adapter, or None."""
        return cast(Carried, self.core_carry[adapter]) if adapter in self.core_carry else None

    def factor(self, name: str, adapter: str) -> torch.Tensor | None:
        """The factor "A", "B" or "C" of an adapter, trained or frozen; None for a core that is the identity."""
        trained = self._parameters_of(name)
        if name == "C":
            return self.expand(adapter, {})
        if adapter in trained:
            tensor: torch.Tensor = trained[adapter]
            return tensor
        basis = self.basis(adapter)
        if basis is None:
            return None
        return basis.A if name == "A" else basis.B

    def pair(self, adapter: str) -> dict[str, torch.Tensor]:
        """The parameters A and B of an adapter, those of them that are trained."""
        return {name: self._parameters_of(name)[adapter] for name in "AB" if adapter in self._parameters_of(name)}

    def theta(self, adapter: str) -> dict[str, torch.Tensor]:
        """The trained tensors that the core is made of; empty where it is the identity."""
        found = {name: self._parameters_of(name) for name in ("C", "S")}
        return {name: parameters[adapter] for name, parameters in found.items() if adapter in parameters}

    def expand(self, adapter: str, copied: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """C (..., r, r) of the core's tensors, or of copies of them; None where the core is the identity."""
        theta = self.theta(adapter)
        if not theta:
            return None
        basis = self.basis(adapter)
        mixed = None if basis is None else basis.P
        theta = {name: copied.get(name, own) for name, own in theta.items()}
        core: torch.Tensor = self.core[adapter].expand(theta, mixed)
        return core

    def basis(self, adapter: str) -> Basis | None:
        """The frozen pair of an adapter, or None where none is frozen."""
        return cast(Basis, self.core_basis[adapter]) if adapter in self.core_basis else None

    @property
    def number_of_copies(self) -> int:
        """How many copies of what is trained share its rows; 1 where there are none."""
        for name, copied in (self.copies or {}).items():
            own = next(iter(self._parameters_of(name).values()))
            return math.prod(copied.shape[: copied.dim() - own.dim()])
        return 1

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (spans := current_spans()) is not None:
            return self._packed(x.reshape(-1, x.shape[-1]), spans).view(*x.shape[:-1], -1)
        y = linear(self.base_layer, x)
        if y is None:
            y = cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters or self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            if torch.is_grad_enabled() or self.copies is not None or x.numel() <= PIECE * x.shape[-1]:
                y = self._with_update(x, y, adapter)
                continue
            # Nothing is kept for a backward: of many tokens the update is never there for all at once.
            whole = (x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
            for some, out in zip(*(torch.split(tokens, PIECE) for tokens in whole), strict=True):
                out.copy_(self._with_update(some, out, adapter))
        return y

    def _with_update(self, x: torch.Tensor, y: torch.Tensor, adapter: str) -> torch.Tensor:
        y = y + self._update(x, adapter).to(y.dtype)
        carry = self.carry(adapter)
        return y if carry is None else y + carry(x).to(y.dtype)

    def _packed(self, x: torch.Tensor, spans: Spans) -> torch.Tensor:
        """As `forward`, on packed tokens (tokens, d_in)."""
        if len(x) != spans.tokens:
            raise RuntimeError(f"{len(x)} rows came to a layer that is to see each of {spans.tokens} tokens")
        off = self.disable_adapters or self.merged
        adapters = [] if off else [adapter for adapter in self.active_adapters if adapter in self.scaling]
        y: torch.Tensor | None = None
        for adapter in adapters:
            if adapter in self.core_D:
                y = (self.base_layer(x) if y is None else y) + self._whole_update(x, adapter, spans).to(x.dtype)
            else:
                (a, c, b), scale = self._factors(adapter), self.scaling[adapter]
                if y is None:
                    y = factored_linear(self.base_layer, x, a, c, b, scale, spans)
                else:
                    y = add_update(y, x, a, c, b, scale, spans)
            if (carry := self.carry(adapter)) is not None:
                y = y + carry(x).to(y.dtype)
        return cast(torch.Tensor, self.base_layer(x)) if y is None else y

    def _whole_update(self, x: torch.Tensor, adapter: str, spans: Spans) -> torch.Tensor:
        """`D x` of packed tokens, in D's dtype."""
        matrices = (self.copies or {}).get("D", self.core_D[adapter])
        each = matrices.reshape(-1, *matrices.shape[-2:])
        return torch.cat(
            [F.linear(part, d) for part, d in zip(torch.split(x.to(each.dtype), list(spans.counts)), each, strict=True)]
        )

    def _update(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """`s·B C A x`, or `D x`, in the trained tensors' dtype."""
        if adapter in self.core_D:
            matrix = (self.copies or {}).get("D", self.core_D[adapter])
            return grouped_linear(x.to(matrix.dtype), matrix)
        h = x
        for weight in self._factors(adapter):
            if weight is not None:
                h = grouped_linear(h.to(weight.dtype), weight)
        scale = self.scaling[adapter]
        return h if scale == 1 else h * scale

    def _factors(self, adapter: str) -> list[Any]:
        """A, C (None: the identity) and B, or copies of them, in the order in which they meet the input.

        Where a copy is a block of a lower rank, the others' leading rows and columns: a client has no more of them.
        """
        copied = self.copies or {}
        factors = [
            self.expand(adapter, copied) if name == "C" else copied.get(name, self.factor(name, adapter))
            for name in FACTORS
        ]
        k = min(_rank(name, factor) for name, factor in zip(FACTORS, factors, strict=True) if factor is not None)
        return [
            factor if factor is None else leading(name, factor, k)
            for name, factor in zip(FACTORS, factors, strict=True)
        ]

    def taken_off(self, adapter: str) -> Factors:
        """The pair that is -s·B A of factors that are trained, as they are."""
        a, b = (self.factor(name, adapter) for name in "AB")
        assert a is not None and b is not None
        return self.negative(Factors(a.detach(), b.detach()), adapter)

    def negative(self, pair: Factors, adapter: str) -> Factors:
        """The pair that is -s·B A."""
        return Factors(pair.A.clone(), (-self.scaling[adapter] * pair.B.double()).float())

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """s·B C A + U V, or D + U V (d_out, d_in), multiplied in float64, in float32."""
        delta: torch.Tensor
        if adapter in self.core_D:
            delta = self.core_D[adapter].double()
        else:
            a, b, c = (self.factor(name, adapter) for name in "ABC")
            assert a is not None and b is not None
            left = b.double() if c is None else b.double() @ c.double()
            delta = self.scaling[adapter] * (left @ a.double())
        if (carry := self.carry(adapter)) is not None:
            delta = delta + carry.matrix()
        return delta.float()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' updates to the base weight; `safe_merge` refuses a result that is not finite."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.scaling:
                self._add_to_base(self.get_delta_weight(adapter), safe=safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged updates out again (up to rounding)."""
        while self.merged_adapters:
            self._add_to_base(-self.get_delta_weight(self.merged_adapters.pop()))

    def _add_to_base(self, delta: torch.Tensor, *, safe: bool = False) -> None:
        base = self.get_base_layer()
        delta = delta.T if isinstance(base, Conv1D) else delta
        weight = base.weight
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise TypeError(f"a {type(base).__name__} cannot be merged into: its weight is quantised")
        merged = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError("merging would put values into the base weight that are not finite")
        weight.data = merged
        forget(weight)

    def _parameters_of(self, name: str) -> nn.ParameterDict:
        parameters: nn.ParameterDict = getattr(self, f"core_{name}")
        return parameters


def _rank(name: str, weight: torch.Tensor) -> int:
    return weight.shape[-2 if name == "A" else -1]


def leading(name: str, weight: torch.Tensor, k: int) -> torch.Tensor:
    """The part of a factor that a client of rank k has: copies of its block stand between leading rows and columns."""
    if _rank(name, weight) == k:
        return weight
    if name == "A":
        return weight[..., :k, :]
    return weight[..., :k] if name == "B" else weight[..., :k, :k]


@contextmanager
def copies(model: nn.Module, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Let layers compute with copies of their trained tensors: {module name: {"C" (or "weight", ...): copies}}.

    Backward belongs inside the context too: gradient checkpointing runs forward again there.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in tensors}
    try:
        for name, copied in tensors.items():
            modules[name].copies = copied
        yield
    finally:
        for module in modules.values():
            module.copies = None


def widths(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a supported linear layer. Raises TypeError for others."""
    if isinstance(layer, BaseTunerLayer):
        return widths(layer.get_base_layer())
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    if isinstance(layer, nn.Linear):  # bitsandbytes' 4- and 8-bit layers are subclasses
        return layer.in_features, layer.out_features
    raise TypeError(f"a {type(layer).__name__} cannot be adapted; adapt nn.Linear or Conv1D layers")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The frozen weight as (d_out, d_in), dequantised, in float32 or wider."""
    if isinstance(layer, BaseTunerLayer):
        return weight_of(layer.get_base_layer())
    weight = dequantised(layer) if is_quantised(layer) else cast(torch.Tensor, layer.weight).detach()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    return weight if weight.dtype == torch.float64 else weight.float()
