"""The factored layer as a PEFT method: `get_peft_model`, `save_pretrained` and `merge_and_unload` work on ours.

PEFT has no public way to register a method from outside its package; the three dictionary entries below are what
its own `register_peft_method` writes, which is why PEFT is pinned to a minor version.
"""

import enum
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftConfig, PeftType
from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters import bases as basis_makers
from fedlotr.adapters.bases import Factors, Request
from fedlotr.adapters.kinds import BASES, CORES, TIES, BasisKind, CoreKind
from fedlotr.adapters.layer import Basis, FactoredLayer, weight_of, widths
from fedlotr.adapters.methods import METHODS, Method
from fedlotr.errors import nearest


class CoreType(str, enum.Enum):  # noqa: UP042 (PEFT prints and hashes its types so)
    """Our entry among PEFT's types; name and value agree because PEFT looks it up by either."""

    FEDLOTR_CORE = "FEDLOTR_CORE"


@dataclass
class CoreConfig(PeftConfig):
    """Configuration of the factored layer; what is None is taken from the method's row."""

    method: str = field(default="fed-sb", metadata={"help": f"A row of the table of methods: {', '.join(METHODS)}."})
    r: int = field(default=16, metadata={"help": "Rank: the core is r × r."})
    alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r; None: the method's."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / √r instead."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Regular expression -> rank of the layers whose names end so."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Regular expression -> alpha of the layers whose names end so."}
    )
    basis: str | None = field(default=None, metadata={"help": f"Where B and A come from: {', '.join(BASES)}."})
    tie: str | None = field(default=None, metadata={"help": f"Who shares B and A: {', '.join(TIES)}."})
    core: str | None = field(default=None, metadata={"help": f"What C is: {', '.join(CORES)}."})
    seed: int = field(default=0, metadata={"help": "Seed of random bases."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Module names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved as a whole."})
    bias: str = field(default="none", metadata={"help": "Biases are not trained; kept for PEFT's own code."})
    bases_sha256: str | None = field(default=None, metadata={"help": "Fingerprint of the frozen factors."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = CoreType.FEDLOTR_CORE
        # Pairs made beforehand, by the name of the tie's first layer (None: the adapter's state brings them); not part
        # of the saved configuration.
        self.bases: dict[str, Factors] | None = {}
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("basis", self.basis, BASES),
            ("tie", self.tie, TIES),
            ("core", self.core, CORES),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"{name} {value!r} is not known{nearest(value, choices)}")
        row = self.row
        if not row.adapts:
            raise ValueError(
                f"method {self.method!r} adapts no layer: train the classification head without an adapter"
            )
        if not row.factored:
            given = [name for name in ("alpha", "basis", "tie", "core") if getattr(self, name) is not None]
            given += [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if getattr(self, name)]
            if given:
                raise ValueError(f"method {self.method!r} trains whole matrices, without {' or '.join(given)}")
        else:
            self.basis, self.tie = self.basis or row.basis, self.tie or row.tie
            self.core = self.core or row.core
        ranks = (self.r, *self.rank_pattern.values())
        if min(ranks) < 1:
            raise ValueError(f"r is {min(ranks)}; a rank is at least 1")
        if row.has_core and self.basis_kind.zero_b:
            raise ValueError(
                f"basis {self.basis!r} has B = 0, so the core of {self.method!r} would never learn; take another basis"
            )
        if not row.may_tie and self.tie not in (None, "layer"):
            raise ValueError(f"method {self.method!r} trains B and A in every layer, so tie {self.tie!r} cannot hold")
        if row.has_core != self.core_kind.trained:
            raise ValueError(
                f"core {self.core!r} does not go with method {self.method!r}, which trains {', '.join(row.train)}"
            )
        blocks = self.core_kind.blocks
        if (uneven := next((r for r in ranks if r % blocks), None)) is not None:
            raise ValueError(
                f"rank {uneven} cannot be cut into the {blocks} blocks of core {self.core!r}; take a multiple"
            )
        if self.basis_kind.one_layer and self.tie != "layer":
            raise ValueError(f"basis {self.basis!r} is made from one layer's weights, so tie {self.tie!r} cannot hold")
        if isinstance(self.target_modules, list | set | tuple):
            self.target_modules = sorted(self.target_modules)

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def basis_kind(self) -> BasisKind:
        """The entry of its basis."""
        return self.row.basis_kind(self.basis)

    @property
    def core_kind(self) -> CoreKind:
        """The entry of its core."""
        return self.row.core_kind(self.core)

    def rank_of(self, name: str) -> int:
        """Of a layer: r, or what the first pattern that is PEFT's name for it says."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)

    def scaling_of(self, name: str) -> float:
        """s in `W x + s·B C A x` of a layer: its alpha / r, or alpha / √r (Kalajdzievski 2023, rsLoRA)."""
        alpha = self.row.alpha if self.alpha is None else self.alpha
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), alpha)
        r = self.rank_of(name)
        return 1.0 if alpha is None else alpha / (math.sqrt(r) if self.use_rslora else r)

    def tag(self, key: str, layer: nn.Module) -> str:
        """The name of the tie that a module belongs to: its own, or its projection type's with the widths."""
        if self.tie in (None, "layer"):
            return key
        if self.tie == "all":
            return "all"
        return projection_type(key, *widths(layer))

    def to_dict(self) -> dict[str, Any]:
        """As PEFT writes it, with sets sorted: files are equal byte for byte from run to run."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


def projection_type(name: str, d_in: int, d_out: int) -> str:
    """What the layers of one projection type have in common: the name without the layer's number, and the widths."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name) + f"@{d_in}x{d_out}"


class CoreModel(BaseTuner):
    """Puts a `FactoredLayer` around every target; bases are made, or checked, once all targets are known."""

    prefix = "core_"
    tuner_layer_cls = FactoredLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (PEFT reads it from the class)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._members: dict[str, list[tuple[str, FactoredLayer]]] = {}
        super().__init__(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject, then fill the bases: a tie's pair needs all of its members."""
        self._members = defaultdict(list)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._fill(cast(CoreConfig, self.peft_config[adapter_name]), adapter_name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(CoreConfig, peft_config)
        layer = target if isinstance(target, FactoredLayer) else FactoredLayer(target)
        d_in, d_out, r, row = layer.in_features, layer.out_features, config.rank_of(current_key), config.row
        if r > min(d_in, d_out) and row.factored:
            raise ValueError(f"rank {r} is above the width of {current_key} ({d_in} in, {d_out} out)")
        core = config.core_kind
        shapes: dict[str, tuple[int, ...]] = {"A": (r, d_in), "B": (d_out, r), "D": (d_out, d_in), **core.shapes(r)}
        tag = config.tag(current_key, layer)
        members = self._members[tag]
        tied: dict[str, torch.Tensor] = {}
        if members:
            check_one_shape([*members, (current_key, layer)])
            check_one_rank(config, [name for name, _ in members] + [current_key])
            tied = members[0][1].pair(adapter_name)
        if not row.freezes:
            basis = None
        elif members:
            basis = members[0][1].basis(adapter_name)
        else:
            mixed = None if core.constant is None else core.constant(r, config.seed, tag)
            basis = Basis(d_in, d_out, r, persistent=not config.basis_kind.derivable, mixed=mixed)
        members.append((current_key, layer))
        layer.add(
            adapter_name,
            r=r,
            scaling=config.scaling_of(current_key),
            basis=basis,
            parameters={
                name: tied[name] if name in tied else torch.ones(shape) if name == "S" else torch.zeros(shape)
                for name, shape in shapes.items()
                if name in row.train or name == "S"
            },
            core=core,
        )
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad([adapter_name], requires_grad=False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _fill(self, config: CoreConfig, adapter: str) -> None:
        """Give every tie its pair; trained factors start from it too, but for B at zero where there is no core."""
        if config.bases is None:
            return
        if config.basis_kind.made_of == "gradient" and not config.bases:
            if config.bases_sha256 is None:
                raise ValueError(
                    f"basis {config.basis!r} needs gradients: config = initialize_basis(model, batches, loss, config) "
                    "first, then get_peft_model(model, config)"
                )
            return  # a saved adapter: its bases come with its state
        ties = self._members if config.row.factored else {}
        with basis_makers.one_thread(), torch.no_grad():
            for tag, members in ties.items():
                layers = [layer for _, layer in members]
                pair = config.bases.get(members[0][0]) or make_basis(config, tag, config.rank_of(members[0][0]), layers)
                basis = layers[0].basis(adapter)
                if basis is not None:
                    basis.A.copy_(pair.A)
                    basis.B.copy_(pair.B)
                elif layers[0].core_A[adapter].device.type != "meta":
                    layers[0].core_A[adapter].copy_(pair.A)
                    if config.row.has_core or config.row.residual:  # a core starts at zero, and B must not
                        layers[0].core_B[adapter].copy_(pair.B)
                for layer in layers if config.row.residual else ():
                    layer.add_carry(adapter, *layer.negative(pair, adapter))
        found = bases_sha256(self.model, adapter)
        if config.bases_sha256 not in (None, found):
            raise ValueError(
                f"the bases made here (SHA-256 {found[:12]}…) are not those the adapter was trained with "
                f"({str(config.bases_sha256)[:12]}…): another base model, or another processor's decomposition"
            )
        config.bases_sha256 = found


def check_one_shape(members: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise ValueError where layers that would share a pair have different widths."""
    for name, layer in members[1:]:
        if widths(layer) != widths(members[0][1]):
            raise ValueError(
                f"layers that share one pair need one shape: {members[0][0]} has {widths(members[0][1])} (in, out), "
                f"{name} has {widths(layer)}; choose layers of one shape as targets, or tie 'type'"
            )


def check_one_rank(config: CoreConfig, names: Sequence[str]) -> None:
    """Raise ValueError where layers that would share a pair have different ranks."""
    ranks = {config.rank_of(name): name for name in names}
    if len(ranks) > 1:
        (r, name), (k, other), *_ = ranks.items()
        raise ValueError(
            f"layers that share one pair need one rank: {name} has {r}, {other} has {k}; choose patterns that mean all "
            "of them or none, or tie 'layer'"
        )


def make_basis(config: CoreConfig, tag: str, r: int, layers: Sequence[nn.Module]) -> Factors:
    """The pair of one tie, of rank r, from its seed or its members' frozen weights."""
    if config.basis_kind.made_of == "gradient":
        raise ValueError(f"initialize_basis made no basis for {tag}; call it again for the present target_modules")
    d_in, d_out = widths(layers[0])
    request = Request(tag, d_in, d_out, r, config.seed, lambda: (weight_of(layer).cpu() for layer in layers))
    return basis_from(config, request)


def basis_from(config: CoreConfig, request: Request) -> Factors:
    """Of the configuration's kind."""
    pair: Factors = config.basis_kind.make(request)
    return pair


def target_layers(model: nn.Module, config: CoreConfig) -> dict[str, nn.Module]:
    """The layers that `get_peft_model(model, config)` would adapt, by name. Raises ValueError where there is none."""
    resolved = _maybe_include_all_linear_layers(copy(config), model)
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and check_target_module_exists(resolved, name)
    }
    if not found:
        raise ValueError(f"no linear layer of this model matches target_modules {config.target_modules!r}")
    return found


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """The adapted layers of a model by name, without the prefix of PEFT's own wrappers."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLayer)
    }


def highest_rank(model: nn.Module, adapter: str = "default") -> int:
    """Of a model's adapted layers; 0 where there is none."""
    return max((layer.r[adapter] for layer in factored_layers(model).values()), default=0)


def bases_of(model: nn.Module, adapter: str = "default") -> dict[str, Factors]:
    """The frozen pairs by the name of the first layer that holds each; a tie's pair appears once."""
    found: dict[int, tuple[str, Factors]] = {}
    for name, layer in factored_layers(model).items():
        basis = layer.basis(adapter)
        if basis is not None:
            found.setdefault(id(basis), (name, Factors(basis.A, basis.B)))
    return dict(found.values())


def bases_sha256(model: nn.Module, adapter: str = "default") -> str:
    """Fingerprint of a model's frozen factors, hexadecimal."""
    return basis_makers.sha256(list(bases_of(model, adapter).items()))


_PEFT_TYPE = cast(PeftType, CoreType.FEDLOTR_CORE)
peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_PEFT_TYPE] = CoreModel.prefix
peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_PEFT_TYPE] = CoreConfig
peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[_PEFT_TYPE] = CoreModel
