"""The same training by Opacus' parts: its hooks for the gradients of examples, its optimizer for clipping and noise.

An oracle, and the engine that people know; one client at a time, without cohorts. What `PrivacyEngine` puts around
these parts is left out, with its traps: batches are drawn here, so that there are as many as were accounted for and
empty ones are steps too; an example whose gradient is not finite counts as zeros; the accountant is the run's own.
"""

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.tuner import factored_layers
from fedlotr.privacy.dp_sgd import ExampleNoise, sampling_rate
from fedlotr.streams import stream_key
from fedlotr.training.cohort import ClientResult, ClientWork, LocalTraining
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel


class _Chain(nn.Module):
    """`W x + s·B C A x` as a chain of linear layers around the very same tensors, which Opacus has hooks for.

    For the cores `full` and `identity`: the others are no plain matrix.
    """

    def __init__(self, layer: FactoredLayer) -> None:
        super().__init__()
        self.base_layer, self.scaling = layer.base_layer, layer.scaling["default"]
        self.chain = nn.Sequential()
        for name in "ACB":
            weight = layer.theta("default").get("C") if name == "C" else layer.factor(name, "default")
            if weight is not None:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                frozen = not isinstance(weight, nn.Parameter)
                linear.weight = nn.Parameter(weight, requires_grad=False) if frozen else weight
                self.chain.append(linear)
        carried = layer.carry("default")
        self.carried = None if carried is None else carried.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out)."""
        y: torch.Tensor = self.base_layer(x)
        y = y + self.scaling * self.chain(x.float()).to(y.dtype)
        return y if self.carried is None else y + self.carried(x).to(y.dtype)


def _with_hooks(module: nn.Module) -> GradSampleModule:
    return GradSampleModule(module, loss_reduction="sum", strict=False)


@contextmanager
def hooked(
    model: TrainableModel, moving: Sequence[str], wrap: Callable[[nn.Module], GradSampleModule] = _with_hooks
) -> Iterator[dict[str, nn.Parameter]]:
    """Let `model.losses(...).sum().backward()` leave `grad_sample` in each of the given parameters.

    wrap: another of Opacus' ways to hook into a module.
    """
    layers = factored_layers(model.module)
    dropouts = {layer: layer.p for layer in model.module.modules() if isinstance(layer, nn.Dropout)}
    # Only in training mode do its hooks work; our training is without dropout.
    for dropout in dropouts:
        dropout.p = 0.0
    parameters = {name: cast(nn.Parameter, model.parameter(name).requires_grad_()) for name in moving}
    for name, layer in layers.items():
        model.module.set_submodule(name, _Chain(layer))
    sampled = wrap(model.module)
    model.module.train()
    try:
        yield parameters
    finally:
        sampled.remove_hooks()
        model.module.eval()
        for name, layer in layers.items():
            model.module.set_submodule(name, layer)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        for dropout, p in dropouts.items():
            dropout.p = p


def train_by_opacus(
    model: TrainableModel,
    starts: Sequence[Mapping[str, torch.Tensor]],
    examples: Examples,
    clients: Sequence[ClientWork],
    training: LocalTraining,
    noise: ExampleNoise,
    keys: Sequence[str],
    server_round: int = 1,
) -> list[ClientResult]:
    """As `train_cohort` with DP-SGD, one client after the other.

    starts: of each client, the published tensors. keys: what the client's generator is seeded by, where the noise is
    reproducible; else the operating system seeds it. It is torch's generator, and not a cryptographic one.
    """
    results = []
    moving = sorted(model.moving(server_round))
    for start, client, key in zip(starts, clients, keys, strict=True):
        seed = stream_key(0, key) if noise.reproducible else secrets.randbits(63)
        generator = torch.Generator().manual_seed(seed)
        model.assign(start)
        with hooked(model, moving) as parameters:
            _steps(model, parameters, examples, client, training, noise, generator)
        values = model.values()
        trained = {name: values[name].clone() for name in moving if name in values}
        steps = training.steps_of(len(client.rows))
        results.append(ClientResult(trained, len(client.rows), steps, None))
    return results


def _steps(
    model: TrainableModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Examples,
    client: ClientWork,
    training: LocalTraining,
    noise: ExampleNoise,
    generator: torch.Generator,
) -> None:
    groups = [
        {"params": [parameter], "lr": training.head_lr if name in model.head_names else training.lr}
        for name, parameter in parameters.items()
    ]
    plain: torch.optim.Optimizer
    if training.optimizer == "adamw":
        plain = torch.optim.AdamW(groups, eps=training.eps, weight_decay=training.weight_decay)
    else:
        plain = torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    held = len(client.rows)
    optimizer = DPOptimizer(
        plain,
        noise_multiplier=noise.sigma,
        max_grad_norm=noise.bound,
        expected_batch_size=min(training.batch_size, held),
        generator=generator,
    )
    rate = sampling_rate(training.batch_size, held)
    for _ in range(training.steps_of(held)):
        rows = client.rows[(torch.rand(held, generator=generator) < rate).numpy()]
        optimizer.zero_grad()
        if len(rows):
            loss = model.losses(examples.batch(rows, model.spec.pad_id).to(model.device)).sum()
            with warnings.catch_warnings():  # torch's, on hooks where no input has a gradient, as token ids have none
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.backward()  # type: ignore[no-untyped-call]
            _leave_out_what_is_not_finite(parameters)
        else:  # a step all the same
            for parameter in parameters.values():
                parameter.grad_sample = torch.zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        optimizer.step()


def _leave_out_what_is_not_finite(parameters: Mapping[str, nn.Parameter]) -> None:
    each = [parameter.grad_sample for parameter in parameters.values()]  # type: ignore[attr-defined]
    finite = np.logical_and.reduce([torch.isfinite(rows.flatten(1)).all(1).cpu().numpy() for rows in each])
    for rows in each:
        rows[~torch.from_numpy(finite)] = 0
