"""What a client process finds on its disk: the recipe of the run, its data, the bases and carried terms it was sent.

Everything else reaches a client in messages. The folder lies in the run directory, in `.work/`, while the run goes on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save
from safetensors.torch import save_file as save_tensors

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.communication.wire_form import UNCODED, Coding
from fedlotr.models.loading import ModelSpec, load_base
from fedlotr.privacy.dp_sgd import ExampleNoise
from fedlotr.training.cohort import LocalTraining
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.moving import gradient_bases

PUBLIC = "public.safetensors"


def work_folder(run: Path, start: str) -> Path:
    """The workplace of one start of a run: a name of its own for each, so that nobody takes an older one's files."""
    return run / ".work" / start


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every client of a run does alike.

    core: the fields of `CoreConfig`, or None where no layer is adapted. weights: what a client's reply weighs.
    threads: to compute with; another number gives other bits. noise: where clients hide their single examples.
    coding: of what crosses. links: of the user's, as `chain.link_classes` finds them. rebase: where bases move, the
    fields of `Rebase`. factors: client -> what it multiplies its updates by, of those that are hostile.
    """

    model: ModelSpec
    core: dict[str, Any] | None
    training: LocalTraining
    weights: Literal["examples", "uniform"]
    seed: int
    threads: int
    noise: ExampleNoise | None = None
    coding: Coding = UNCODED
    links: tuple[str, ...] = ()
    rebase: dict[str, Any] | None = None
    factors: dict[str, float] = field(default_factory=dict)


class Workplace:
    """A `.work` folder: written once by the server, read by every worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def write(
        cls,
        folder: Path,
        recipe: Recipe,
        train: Examples,
        test: Examples,
        parts: Sequence[npt.NDArray[np.int64]],
        bases: Mapping[str, Factors],
        carry: Mapping[str, Factors],
        held_back: Sequence[npt.NDArray[np.int64]] = (),
        further: Mapping[str, Examples] | None = None,
        public: Examples | None = None,
    ) -> "Workplace":
        """Lay out the folder. parts: each client's rows of `train`. bases: of `bases_of`; none where none is frozen.

        carry: by layer the pair of the adapter that the run starts from, which is to clients a part of the base.
        held_back: the rows of `train` that each client is evaluated on by itself, and never trains on.
        further: what the server has evaluated beside `test`: "choices" of its rows, "prompts" to be answered,
        "triggered" ones.
        public: rows of which clients make bases by themselves.
        """
        folder.mkdir(parents=True, exist_ok=True)
        train.save(folder / "train.safetensors")
        for name, examples in {"test": test, **(further or {})}.items():
            examples.save(folder / f"{name}.safetensors")
        if public is not None:
            public.save(folder / PUBLIC)
        dealt = {"": parts, "held_": held_back or [np.zeros(0, np.int64)] * len(parts)}
        columns = {f"{of}rows": np.concatenate(rows) for of, rows in dealt.items()}
        offsets = {f"{of}offsets": np.cumsum([0, *(len(one) for one in rows)]) for of, rows in dealt.items()}
        save_file({**columns, **offsets}, folder / "clients.safetensors")
        _save_pairs(bases, folder / "bases.safetensors")
        _save_pairs(carry, folder / "carry.safetensors")
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")
        return cls(folder)

    @cached_property
    def recipe(self) -> Recipe:
        """As written."""
        found = json.loads((self.folder / "recipe.json").read_text(encoding="utf-8"))
        return Recipe(
            model=ModelSpec(**{**found["model"], "head_rows": tuple(found["model"]["head_rows"])}),
            core=found["core"],
            training=LocalTraining(**found["training"]),
            weights=found["weights"],
            seed=found["seed"],
            threads=found["threads"],
            noise=None if found["noise"] is None else ExampleNoise(**found["noise"]),
            coding=Coding(**found["coding"]),
            links=tuple(found["links"]),
            rebase=found["rebase"],
            factors=found["factors"],
        )

    @cached_property
    def train(self) -> Examples:
        """All clients' training examples."""
        return Examples.load(self.folder / "train.safetensors")

    @cached_property
    def test(self) -> Examples:
        """The server's held-out examples."""
        return Examples.load(self.folder / "test.safetensors")

    @cached_property
    def choices(self) -> Examples:
        """The choices of the test rows."""
        return Examples.load(self.folder / "choices.safetensors")

    @cached_property
    def prompts(self) -> Examples:
        """What of the test rows is to be answered."""
        return Examples.load(self.folder / "prompts.safetensors")

    @cached_property
    def triggered(self) -> Examples:
        """The test rows in which a backdoor's trigger stands."""
        return Examples.load(self.folder / "triggered.safetensors")

    @cached_property
    def _clients(self) -> dict[str, npt.NDArray[np.int64]]:
        return load_file(self.folder / "clients.safetensors")

    def rows(self, client: int) -> npt.NDArray[np.int64]:
        """The rows of `train` that belong to a client. Raises IndexError for a client that does not exist."""
        offsets = self._clients["offsets"]
        return self._clients["rows"][offsets[client] : offsets[client + 1]]

    def held_back(self, client: int) -> npt.NDArray[np.int64]:
        """The rows of `train` that a client is evaluated on."""
        offsets = self._clients["held_offsets"]
        return self._clients["held_rows"][offsets[client] : offsets[client + 1]]

    def step_tokens(self, clients: Sequence[int]) -> list[int]:
        """Tokens of one optimizer step of each client: what its cohort's size is reckoned by."""
        lengths, batch = self.train.lengths, self.recipe.training.batch_size
        return [round(float(lengths[rows].mean()) * min(len(rows), batch)) for rows in map(self.rows, clients)]

    def build_model(self) -> TrainableModel:
        """The frozen base with the adapter, loaded in this process; the loading is put on record for the log."""
        recipe = self.recipe
        core = None if recipe.core is None else CoreConfig(**recipe.core)
        if core is not None:
            core.bases = _load_pairs(self.folder / "bases.safetensors")
            if core.row.freezes:
                core.bases_sha256 = None  # a client replies with the fingerprint of what it has; the server compares
        carry = _load_pairs(self.folder / "carry.safetensors")
        model = TrainableModel(load_base(recipe.model), recipe.model, core, carry)
        self.record_load()
        return model

    @property
    def public(self) -> Examples:
        """The public rows, in a run whose clients make bases of them."""
        return Examples.load(self.folder / PUBLIC)

    def keep_public(self, examples: Examples) -> None:
        """Keep public rows that a message brought, as a client's own disk would."""
        if not (self.folder / PUBLIC).exists():
            partial = self.folder / f"public.{os.getpid()}.partial"
            examples.save(partial)
            partial.replace(self.folder / PUBLIC)

    def first_bases(self, head: Mapping[str, torch.Tensor]) -> dict[str, Factors]:
        """Bases made here of the gradient on the public rows, as the server makes them. head: what is behind them."""
        recipe = self.recipe
        assert recipe.core is not None
        core = CoreConfig(**recipe.core)
        core.bases_sha256 = None
        bare = TrainableModel(load_base(recipe.model), recipe.model, None)
        self.record_load()
        bare.assign(head)
        examples = self.public
        return gradient_bases(bare, core, examples, np.arange(len(examples))).bases or {}

    def save_carry(self, carry: Carry) -> None:
        """Keep what a client has received, as its own disk would: one file a version, the last two of them."""
        path = self._carry_path(carry.version)
        if not path.exists():
            tensors, about = carry.saved()
            path.parent.mkdir(exist_ok=True)
            # Several workers may be at it at once: each under a name of its own, and whoever is last replaces its like.
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(save(tensors, {"about": json.dumps(about)}))
            partial.replace(path)
            for old in path.parent.glob("*.safetensors"):
                if int(old.stem) < carry.version - 1:
                    old.unlink(missing_ok=True)

    def has_carry(self, version: int) -> bool:
        """Whether that version is on this disk."""
        return self._carry_path(version).exists()

    def load_carry(self, least: int, most: int) -> Carry | None:
        """The latest version between two that is on this disk, or None."""
        for version in range(most, least - 1, -1):
            path = self._carry_path(version)
            if path.exists():
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                    return Carry.restored(tensors, json.loads(file.metadata()["about"]))
        return Carry.start(_load_pairs(self.folder / "carry.safetensors")) if least == 0 else None

    def _carry_path(self, version: int) -> Path:
        return self.folder / "carry" / f"{version}.safetensors"

    def record_load(self) -> None:
        """Note that this process loaded the frozen base once more."""
        with open(self.folder / "loads", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")

    def loads(self) -> list[int]:
        """The process that loaded the base, for each time it was loaded."""
        path = self.folder / "loads"
        return [int(line) for line in path.read_text(encoding="utf-8").split()] if path.exists() else []


def _save_pairs(pairs: Mapping[str, Factors], path: Path) -> None:
    tensors = {f"{name}.{side}": t for name, pair in pairs.items() for side, t in zip("AB", pair, strict=True)}
    save_tensors({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)


def _load_pairs(path: Path) -> dict[str, Factors]:
    found = load_tensors(path)
    return {name[:-2]: Factors(found[name], found[f"{name[:-2]}.B"]) for name in found if name.endswith(".A")}


def install_bases(model: TrainableModel, bases: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Replace a model's frozen factors by those a message brought. Raises KeyError for a layer it does not have."""
    layers = factored_layers(model.module)
    with torch.no_grad():
        for name, (a, b) in bases.items():
            basis = layers[name].basis("default")
            assert basis is not None
            basis.A.copy_(a)
            basis.B.copy_(b)
