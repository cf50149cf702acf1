"""What the round loop is told of a run: clients, rates, bases, and how the certificate reads the trained tensors."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.tuner import bases_of, factored_layers
from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import measure
from fedlotr.flower.certificate import Layer
from fedlotr.flower.federation import Federation, Weights
from fedlotr.flower.links.ranks import client_ranks
from fedlotr.flower.records import bases_record, derivable_record
from fedlotr.privacy.guard import NoGuard
from fedlotr.run.preparation import Prepared
from fedlotr.training.model import TrainableModel

LR_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the run's rounds that are done -> what the learning rates are multiplied by."""


def federation(config: SimulationConfig, prepared: Prepared, guard: NoGuard | None = None) -> Federation:
    """What the round loop needs to know of this run. guard: of its privacy (default: nothing is promised)."""
    checked, model, own = prepared.checked, prepared.model, prepared.checked.own_task
    factor = LR_FACTORS[config.lr_schedule]
    bases = bases_of(model.module)
    basis: Any = None
    if bases and checked.core is not None:
        if checked.core.basis_kind.derivable:
            basis = derivable_record(config.seed, prepared.bases_sha256)
        else:
            basis = bases_record(bases)
    return Federation(
        clients=len(checked.parts),
        sampled=config.clients_per_round,
        rounds=config.rounds,
        seed=config.seed,
        max_failed=config.max_failed,
        lr_factor=lambda server_round: factor((server_round - 1) / config.rounds),
        basis=basis,
        bases_sha256=prepared.bases_sha256,
        layers=certificate_layers(model),
        held_out=len(prepared.workplace.test),
        task=checked.task.kind,
        method=config.method,
        moving=lambda server_round: frozenset(model.published) & model.moving(server_round),
        measure=None if own is None or own.metric_name is None else partial(measure, own),
        ranks=ranks_of(config),
        rank=config.rank,
        mean_moments=config.optimizer_state == "mean-v",
        carried=model.carried,
        guard=guard or NoGuard(),
        coding=config.coding,
        links=config.links,
        weights=Weights(config.max_weight, config.weights == "uniform"),
        max_update_norm=config.max_update_norm,
        refuse_large=config.on_large_update == "refuse",
        watched=config.baseline is None,
    )


def ranks_of(config: SimulationConfig) -> list[int] | None:
    """The rank of each client, where they differ."""
    return None if config.client_rank is None else client_ranks(config.client_rank, config.clients, config.seed)


def certificate_layers(model: TrainableModel) -> list[Layer]:
    """The adapted layers as the certificate reads them; none where a part of each stays with the clients."""
    if model.personal:
        return []
    by_module: dict[str, dict[str, str]] = {}
    for (module, part), tensor in model.names.items():
        if module not in model.heads and part != "S":
            by_module.setdefault(module, {})[part] = tensor
    layers = factored_layers(model.module)

    def frozen(module: str, factor: str) -> Any:
        if factor in by_module[module]:
            return None
        tensor = layers[module].factor(factor, "default")
        return None if tensor is None else tensor.detach().numpy().astype(np.float64)

    def core(layer: FactoredLayer) -> Callable[[Any], Any]:
        basis = layer.basis("default")
        mixed = None if basis is None or basis.P is None else basis.P.double()
        return lambda theta: layer.core["default"].expand({"C": torch.tensor(theta)}, mixed).numpy()

    return [
        Layer(
            trained,
            frozen(module, "A"),
            frozen(module, "B"),
            layers[module].scaling["default"],
            core(layers[module]),
            module,
        )
        for module, trained in by_module.items()
    ]
