"""A program that trains on a device without numbers, where a tensor that lies on another one is an error.

torch can be told of a backend in Python, and its fake tensors then know of each where it lies: what would fail on a GPU
because something was left on the CPU fails here too. Words: model folder, kind, method.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.gradient_bases import initialize_basis
from fedlotr.adapters.layer import widths
from fedlotr.adapters.start import carrying
from fedlotr.adapters.tuner import CoreConfig
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise, client_stream
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.corrections import ControlVariates, proximal
from fedlotr.training.head import fit_head
from fedlotr.training.model import TrainableModel
from tests.training.test_training import examples_for

DEVICE = "elsewhere"


class OneLook:
    """In place of L-BFGS, which looks at numbers: the loss and its gradient, once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def zero_grad(self) -> None:
        pass

    def step(self, closure: Any) -> None:
        closure()


def to(module: nn.Module, *words: Any) -> nn.Module:
    """In place of the module's own `to`, which cannot move parameters without numbers: there are none to be moved."""
    for part in module.modules():
        assert all(p.device == torch.device(DEVICE, 0) for p in part.parameters(recurse=False))
        part._buffers.update({name: None if b is None else b.to(*words) for name, b in part._buffers.items()})
    return module


def bring(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put a real model's tensors on the device."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    there = mode.from_tensor(tensor.detach()).to(DEVICE)
                    there = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
                    kind[name] = moved.setdefault(id(tensor), there)


def main(folder: str, kind: Any, method: str) -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    numpy = torch.Tensor.numpy
    torch.Tensor.numpy = lambda t, **_: np.zeros(t.shape) if isinstance(t, FakeTensor) else numpy(t)  # type: ignore
    FakeTensor.__bool__ = lambda _: True  # type: ignore[method-assign,assign]
    FakeTensor.__float__, FakeTensor.__int__ = lambda _: 0.0, lambda _: 0  # type: ignore
    torch.optim.LBFGS = OneLook  # type: ignore[misc,assignment]
    spec = ModelSpec(folder, kind, 0 if kind == "causal-lm" else 3, "bert" in folder, 0)
    base = load_base(spec)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    bring(base, mode)
    nn.Module.to = to  # type: ignore[method-assign,assignment]
    examples = examples_for(spec)
    core = CoreConfig(method=method, r=4, target_modules=adaptable_layers(base, "all-linear"))
    with mode:
        name = core.target_modules[0]  # type: ignore[index]
        d_in, d_out = widths(base.get_submodule(name))
        carry = {name: Factors(torch.zeros(2, d_in), torch.zeros(d_out, 2))}
        bare = TrainableModel(base, spec, None)
        vars(bare)["output"] = None  # which is found by trying, and takes tokens by their targets
        with carrying(base, carry):
            fit_head(bare, examples, np.arange(6))
            if core.basis == "update":
                core = initialize_basis(
                    base,
                    [[0, 1], [2, 3]],
                    lambda _, rows: bare.losses(examples.batch(rows, 0).to(bare.device)).sum(),
                    core,
                )
        model = TrainableModel(base, spec, core, carry)
        vars(model)["output"] = None
        assert {tensor.device.type for tensor in [*base.parameters(), *base.buffers()]} == {DEVICE}
        start = {name: value.cpu() for name, value in model.values().items()}
        work = [ClientWork(np.arange(k, 4 * k + 5), np.random.default_rng(k)) for k in range(3)]
        begun = {name: torch.stack([value] * 3) for name, value in model.start(start).items()}
        zeros = {name: torch.zeros_like(value) for name, value in begun.items()}
        variates = ControlVariates({name: value[:1] for name, value in zeros.items()}, zeros)
        noise = DPSGD(ExampleNoise(1.0, 1.0, reproducible=True), [client_stream(True, 0, 1, k) for k in range(3)])
        for optimizer, keep, transform, mechanism in (
            ("adamw", "keep", proximal(0.1, begun), None),
            ("sgd", "reset", variates, None),
            ("adamw", "reset", None, noise),
        ):
            training = LocalTraining(2, None, 4, optimizer, clip_norm=1.0, optimizer_state=keep)  # type: ignore
            results = train_cohort(model, start, examples, work, training, transform, 1, mechanism)
            assert len(results) == 3 and all(t.device.type == "cpu" for r in results for t in r.tensors.values())
        variates.means(0)
        evaluate(model, examples, np.arange(7), Results.empty(7))


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), *sys.argv[2:])
