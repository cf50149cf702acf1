"""From a configuration to the things that its words name: every mistake is reported, and nothing heavy happens."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlotr.adapters.layer import widths
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.tuner import CoreConfig, check_one_shape
from fedlotr.config.configuration import SimulationConfig
from fedlotr.config.own import HIDDEN, other_than_named
from fedlotr.config.partitions import CLIENT, column_of
from fedlotr.config.preflight import if_moved
from fedlotr.data import (
    Groups,
    Names,
    OwnData,
    OwnTask,
    Source,
    Task,
    apply_task,
    check_task,
    default_partition,
    groups_of,
    load_source,
    parse_partition,
    partition,
    resolve_task,
    task_name,
    unshared_classes,
    withhold_public,
)
from fedlotr.data.columns import CHAT, TEXT, instead_of_chat
from fedlotr.data.labels import Labels
from fedlotr.errors import InputError
from fedlotr.fleet.modes import is_built_in
from fedlotr.models.adapted import Adapted, what_is_adapted
from fedlotr.models.limits import known_tokens, most_positions
from fedlotr.models.loading import ModelSpec
from fedlotr.models.meta import chosen_layers
from fedlotr.models.mixtures import in_mixtures
from fedlotr.models.source import (
    check_length,
    dtype_on_disk,
    hub_name,
    load_tokenizer,
    pad_id,
    positions_of,
    read_architecture,
    supported_folder,
    vocabulary,
)
from fedlotr.models.supported import is_sentence_encoder
from fedlotr.models.user_model import OwnModel, keep_model, move_model
from fedlotr.run.base_head import with_saved_head
from fedlotr.run.baselines import pooled
from fedlotr.run.brought import NOTHING_BROUGHT, Brought
from fedlotr.run.contents import Content, code_content, fleet_content, model_content
from fedlotr.run.examples import Dealt, Tokenised, check_tokens, encode_one, tokenised
from fedlotr.run.layer_ranks import Patterns, check_ties, layer_patterns
from fedlotr.run.poison import classless, triggered_test
from fedlotr.run.public_rows import check_public, check_scored
from fedlotr.run.sheet import Sheet, chosen_on_test, sheet_of
from fedlotr.run.skeleton import build_skeleton
from fedlotr.run.warm_start import WarmStart, warm_start
from fedlotr.said import say
from fedlotr.streams import generator
from fedlotr.training.cohort import LocalTraining
from fedlotr.training.packing import Rows

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checked:
    """A configuration whose words have become things; nothing heavy has happened yet.

    source: of its train the rows that are used, one for each example. public: those withheld from all clients, or,
    where there is one, examples of `public_source`; parts: each client's to train on; held_back: those it is evaluated
    on by itself. examples: all of them, as tokens. test_rows: the rows of the test split, one for each example; sheet:
    what they are scored by.
    groups: of all rows of train, where they were dealt by groups.
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
    labels: Labels
    test_rows: Rows
    examples: Tokenised
    sheet: Sheet
    start: WarmStart | None
    own_model: OwnModel | None = None
    own_task: OwnTask | None = None
    held_back: list[Rows] = field(default_factory=list)
    public_source: Source | None = None
    adapted: Adapted = field(default_factory=Adapted)
    groups: Groups | None = None

    @cached_property
    def contents(self) -> dict[str, Content]:
        """Option -> what the files that it names hold, whatever they are called. Raises InputError for damaged weights.

        A model of the caller's own is known by its name.
        """
        config = self.config
        found = {
            "data": {"rows": self.source.sha256},
            "strategy": code_content([config.strategy] if config.strategy else []),
            "add_link": code_content(config.links),
            "template": code_content([config.template]),
            "format": code_content([config.format] if config.format else []),
            "fleet": fleet_content(config.fleet),
            "staleness": {} if is_built_in(config.staleness or "") else code_content([config.staleness or ""]),
        }
        if self.config.eval_data is not None:
            found["eval_data"] = found["data"]
        if self.public_source is not None:
            found["public_data"] = {"rows": self.public_source.sha256}
        if self.start is not None:
            found["init_adapter"] = {"files": self.start.sha256}
        if self.own_model is None:
            try:
                found["model"] = model_content(Path(self.spec.path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"--model {self.config.model}: its files cannot be read: {error}") from error
        return found

    @property
    def base_name(self) -> str:
        """What to call the base in files that others read: a hub id, or the folder or GGUF file the user gave."""
        return hub_name(self.config.model)

    def in_place(self, work: Path) -> "Checked":
        """With the caller's own model, if there is one, in the folder of the run's workers."""
        if self.own_model is None:
            return self
        own = move_model(self.own_model, work / "model")
        return replace(self, own_model=own, spec=replace(self.spec, path=str(own.folder)))


def columns_of(config: SimulationConfig, *, own_task: bool = False) -> Names:
    """What the configuration says of the data's columns. own_task: whether a task of the caller's own reads them."""
    text = tuple(config.text_column.split(",")) if config.text_column else ()
    rule = parse_partition(config.partition or f"natural:{CLIENT}")[0]
    column = column_of(config.partition or f"natural:{CLIENT}")
    return Names(
        text,
        config.label_column,
        config.task == "causal-lm",
        client=column if rule == "natural" else None,
        client_if_unlabelled=config.partition is None,
        grouped=column if rule == "dirichlet" else None,
        told=config.privacy != "client",
        nested=own_task,
        format=config.format,
        columns=config.renamed,
        asked=config.task,
        hidden=config.privacy != "none",
    )


def read_source(config: SimulationConfig, data: OwnData | None = None, *, own_task: bool = False) -> Source:
    """The rows that a configuration names, or the caller's own. Raises InputError as `load_source` does.

    own_task: whether a task of the caller's own reads them.
    """
    return load_source(
        config.data if data is None else data,
        seed=config.seed,
        eval_split=config.eval_split,
        names=columns_of(config, own_task=own_task),
        eval_data=config.eval_data,
    )


def check(
    config: SimulationConfig,
    wrong: Collection[str] = (),
    brought: Brought = NOTHING_BROUGHT,
    *,
    source: Source | None = None,
) -> Checked:
    """Read the data and the model's architecture, and deal the examples to the clients.

    brought: the caller's own things; the configuration in the result names them. source: the data, where they have
    been read.

    wrong: fields that are known to be wrong, whose mistakes are not looked for again, nor what depends on them.
    Raises InputError with every mistake that can be told from what does load, and in any case where a field is wrong.
    """
    found = _Findings(config, wrong, brought)
    source, task, own_task = _data(found, source)
    labels, dealt = _clients(found, source, task)
    public_source = _public(found, source, task, own_task)
    own, folder, tokenizer = _model_files(found)
    if source is not None and task is not None and tokenizer is not None and labels is not None:
        # One row shows whether --max-length leaves room for any text, and whether there is such a template.
        attempt_one = partial(encode_one, found.config, task, source, tokenizer)
        found.attempt(attempt_one, "max_length", "template")
    if folder is not None and found.config.dtype == "saved":
        saved_in, model = folder, found.config.model
        if (dtype := found.attempt(lambda: dtype_on_disk(saved_in, model), "dtype", "model")) is not None:
            found.config = found.config.model_copy(update={"dtype": dtype})
    spec, core, start, adapted = None, None, None, Adapted()
    if folder is not None and tokenizer is not None and found.config.dtype != "saved":
        spec, told = _spec(found.config, folder, tokenizer, task, own)
        core, start, adapted = _base(found, spec, task)
        if told is not None and (start is None or not start.head):
            say(f"--model {found.config.model}: {told}")
    if found.problems or wrong:
        raise InputError(found.problems)
    assert source is not None and task is not None and tokenizer is not None and spec is not None
    assert labels is not None and dealt is not None
    config = found.config
    public, parts, groups = dealt
    if public_source is not None:
        public = generator(config.seed, "public-data").permutation(len(public_source.train))[: config.public_examples]
    parts, held_back = hold_back(parts, config.client_eval or 0.0, config.seed)
    rows = Dealt(
        source=source,
        labels=labels,
        public=public,
        parts=parts,
        held_back=held_back,
        test_rows=_test_rows(config, len(source.test)),
        public_source=public_source,
        groups=groups,
    )
    examples, rows, limit = tokenised(config, task, tokenizer, rows, found.positions)
    check_tokens(config, rows, examples, tokenizer, found.tokens)
    sheet = sheet_of(config, task, rows.source, rows.test_rows, tokenizer, found.positions)
    if (note := chosen_on_test(config, source)) is not None:
        say(note)
    triggered = triggered_test(config, task, rows.source, rows.test_rows, tokenizer, limit)
    sheet = replace(sheet, triggered=triggered)
    config = config.model_copy(update={"max_length": limit})
    training, parts = _training(config), list(rows.parts)
    if config.baseline == "central":
        parts, training = pooled(parts, training, config.sampled_clients)
    return Checked(
        config=config,
        source=rows.source,
        task=task,
        tokenizer=tokenizer,
        spec=spec,
        core=core,
        training=training,
        public=rows.public,
        parts=parts,
        labels=rows.labels,
        test_rows=rows.test_rows,
        examples=examples,
        sheet=sheet,
        start=start,
        own_model=own,
        own_task=own_task,
        held_back=list(rows.held_back),
        public_source=public_source,
        adapted=adapted,
        groups=rows.groups,
    )


class _Findings:
    """What is wrong with a configuration, as far as it has been looked at; and the configuration, as it is then."""

    def __init__(self, config: SimulationConfig, wrong: Collection[str], brought: Brought) -> None:
        self.config, self.wrong, self.brought = config, wrong, brought
        self.problems: list[str] = []
        self.positions: int | None = None
        """That the model has."""
        self.tokens: int | None = None
        """That it has an embedding for."""

    def attempt(self, step: Callable[[], _T], *fields: str) -> _T | None:
        """What a step returns; None where one of its fields is known to be wrong, or where it finds something wrong."""
        if any(field in self.wrong for field in fields):
            return None
        try:
            return step()
        except InputError as error:
            moved = self.config.resume and fields
            told = [text + (if_moved(fields[0], text) if moved else "") for text in error.problems]
            self.problems.extend(problem for problem in told if problem not in self.problems)
            return None

    def name(self, field: str, name: str) -> None:
        """Have the configuration name what the caller brought."""
        problem = other_than_named(field, getattr(self.config, field), name)
        self.problems.extend([problem] if problem else [])
        self.config = self.config.model_copy(update={field: name})


def _data(found: _Findings, source: Source | None) -> tuple[Source | None, Task | None, OwnTask | None]:
    """The rows, and what is learnt from them. source: where they have been read."""
    config, brought = found.config, found.brought
    fields = ("data", "eval_data", "eval_split", "format", "columns", "text_column", "label_column")
    source = source or found.attempt(
        lambda: read_source(config, brought.data, own_task=brought.task is not None), *fields
    )
    for note in source.notes if source is not None else ():
        say(note)
    if source is not None and brought.data is not None:
        if config.privacy != "none":
            source = replace(source, name=HIDDEN)
        found.name("data", source.name)
    own_task = found.attempt(lambda: check_task(brought.task)) if brought.task is not None else None
    if own_task is not None:
        found.name("task", task_name(own_task))
        options = ("format", "columns", "text_column", "label_column", "label_names", "join_labels")
        if unread := [option for option in options if getattr(config, option) not in (None, False)]:
            found.problems.append(f"{unread[0]}: the task given to run_simulation reads the rows itself; leave it out")
        if METHODS[config.method].personal and own_task.metric_name is not None:
            found.problems.append(
                f"--method {config.method}: factors stay with the clients, who are scored by accuracy or perplexity on "
                f"rows of their own, not by the task's {own_task.metric_name!r}; choose a method without such factors"
            )
    if source is None:
        return None, None, own_task
    raw = source
    if own_task is not None:
        source, task = found.attempt(lambda: apply_task(own_task, raw)) or (None, None)
        return _left_out(config, source, own=True), task, own_task
    if brought.task is not None:
        return source, None, None
    told = config.privacy == "none"
    task = found.attempt(
        lambda: resolve_task(config.task, raw, config.labels, joined=config.join_labels, told=told),
        *("task", "label_names", "join_labels"),
    )
    return _left_out(config, source, () if config.text_column or task is None else task.columns), task, None


def _left_out(
    config: SimulationConfig, source: Source | None, columns: Collection[str] = (), *, own: bool = False
) -> Source | None:
    """The source without what a task reads of these columns among those that none reads; chat there is told.

    own: whether a task of the caller's reads the rows, all that are read. Of private data nothing is named: a column
    may be there for the sake of a single row.
    """
    if source is None:
        return None
    if config.privacy != "none":
        return source
    texts = [name for name, kind in source.beside.items() if kind == TEXT] if own else columns
    source = source.read_by([*texts, *([config.score_by] if config.score_by else [])])
    for name in (name for name, kind in source.left_out.items() if kind == CHAT):
        say(f"--data {source.name}: '{name}' left out: {instead_of_chat(name)}")
    return source


def _clients(
    found: _Findings, source: Source | None, task: Task | None
) -> tuple[Labels | None, tuple[Rows, list[Rows], Groups | None] | None]:
    """The labels of the rows to train on, and these as they are dealt out, as `_deal` has it."""
    if source is None or task is None:
        return None, None
    config = found.config
    if not task.headed and config.method == "head":
        found.problems.append(
            "--method head: a language model has no classification head; choose a method that adapts layers"
        )
    if task.headed:
        found.problems += [
            f"--{field.replace('_', '-')}: it is about what a language model is shown, and these texts have labels; "
            "leave it out, or give --task causal-lm"
            for field in ("template", "train_on", "template_date", "eos")
            if getattr(config, field) != type(config).model_fields[field].default
        ]
    if task.headed and config.samples:
        found.problems.append(
            f"--samples {config.samples}: a {'regression' if task.scale else 'classifier'} says nothing that could be "
            "shown; leave it out (--sample is the number or share of the clients that train in a round)"
        )
    found.problems += classless(config, task)
    labels = found.attempt(lambda: task.labels(source.train, partial(source.place, "train")))
    for line in unshared_classes(source, task, told=config.privacy == "none") if labels is not None else ():
        say(line)
    found.attempt(lambda: check_scored(config, source, task), "privacy", "eval_split", "eval_data", "public_eval")
    if labels is None:
        return None, None
    chosen = config.partition or default_partition(source.train.column_names, labelled=bool(task.label_names))
    found.config = config.model_copy(update={"partition": chosen})
    fields = ("partition", "clients", "max_examples", "public_examples")
    return labels, found.attempt(lambda: _deal(config, chosen, source, labels, task.columns), *fields)


def _public(found: _Findings, source: Source | None, task: Task | None, own_task: OwnTask | None) -> Source | None:
    """What --public-data names, where it names something."""
    config = found.config
    if config.public_data is None or task is None:
        return None
    public = found.attempt(lambda: _public_source(config, task, own_task), "public_data", "data")
    for note in public.notes if public is not None else ():
        say(f"--public-data: {note}")
    if public is not None and source is not None:
        found.attempt(lambda: check_public(config, public, source, task), "privacy")
    return public


def _model_files(found: _Findings) -> tuple[OwnModel | None, Path | None, PreTrainedTokenizerBase | None]:
    """The caller's own model, if there is one; the folder that the model lies in; and its tokenizer."""
    brought = found.brought
    own: OwnModel | None = None
    folder: Path | None
    if brought.model is not None:
        own = found.attempt(lambda: keep_model(brought.model, brought.folder))
        if own is not None:
            found.name("model", own.name)
        folder = None if own is None else own.folder
    else:
        config, fetch = found.config, not found.wrong and not found.problems  # not for a run that will not start
        folder = found.attempt(lambda: supported_folder(config.model, config.quantize, fetch=fetch), "model")
    if folder is None:
        return own, None, None
    config, place = found.config, folder
    tokenizer = own.tokenizer if own else found.attempt(lambda: load_tokenizer(place, config.model))

    def check_its_length() -> None:
        architecture = own.architecture if own else read_architecture(place, config.model)
        if config.max_length != "auto":
            check_length(architecture, config.model, config.max_length)

    found.attempt(check_its_length, "max_length")
    return own, folder, tokenizer


def _spec(
    config: SimulationConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    own: OwnModel | None,
) -> tuple[ModelSpec, str | None]:
    """How the base is built, and what is to be said of the head that its files have.

    A guess where the data do not tell the task: it can still have too narrow layers.
    """
    spec = ModelSpec(
        path=str(folder),
        kind=task.kind if task else "causal-lm" if config.task == "causal-lm" else "classification",
        labels=task.outputs if task else 2,
        mean_pooled=is_sentence_encoder(folder),
        pad_id=pad_id(tokenizer, vocabulary(own.architecture if own else read_architecture(folder, config.model))),
        dtype="float32" if config.dtype == "auto" else config.dtype,  # auto: only looked at, not run
        code=own.code if own else None,
        code_folder=own.code_folder if own else "",
        checkpointed=config.gradient_checkpointing,
        quantize=config.quantize,
        device="cpu" if config.device == "auto" else config.device,
    )
    return with_saved_head(spec, task.label_names if task else ())


def _base(found: _Findings, spec: ModelSpec, task: Task | None) -> tuple[CoreConfig | None, WarmStart | None, Adapted]:
    """What `_adapter` says, once the model stands on the meta device and has room for --max-length."""
    config, sure = found.config, task is not None
    skeleton = found.attempt(lambda: build_skeleton(config, spec, sure=sure))
    if skeleton is None:
        return None, None, Adapted()
    table, limit = most_positions(skeleton), config.max_length
    found.positions, found.tokens = positions_of(skeleton.config, table), known_tokens(skeleton)
    if limit != "auto" and not any("--max-length" in problem for problem in found.problems):
        found.attempt(lambda: check_length(skeleton.config, config.model, limit, table), "max_length")
    return _adapter(found, skeleton, task.label_names if task else (), sure=sure)


def _adapter(
    found: _Findings, skeleton: nn.Module, names: Sequence[str], *, sure: bool
) -> tuple[CoreConfig | None, WarmStart | None, Adapted]:
    """What is put on the base, what that starts from, and which layers these are.

    skeleton: the model on the meta device. names: of the classes. sure: the data tell what the model is for.
    """
    config = found.config
    core: CoreConfig | None = None
    adapts = METHODS[config.method].adapts
    targets = found.attempt(lambda: chosen_layers(skeleton, config.targets), "targets") if adapts else []
    if targets is None:
        return None, None, Adapted()
    adapted = what_is_adapted(skeleton, targets, config.targets) if adapts else Adapted()
    if config.privacy == "example" and config.privacy_engine == "opacus":
        found.attempt(lambda: _check_hooks(skeleton, targets), "privacy_engine", "targets")
    if adapts:
        sizes = {name: widths(skeleton.get_submodule(name)) for name in targets}
        patterns = None
        if METHODS[config.method].factored:
            about = ("rank", "rank_pattern", "alpha_pattern", "cap_rank")
            patterns = found.attempt(lambda: layer_patterns(config, sizes), *about)
        core = found.attempt(
            lambda: _core(config, targets, patterns), "method", "rank", "alpha", "basis", "tie", "core"
        )
        if core is not None and core.tie == "all":
            found.attempt(lambda: _check_one_shape(skeleton, targets), "tie")
        if core is not None and patterns is not None:
            found.attempt(lambda: check_ties(core, skeleton, targets), "tie", "rank_pattern")
    if config.init_adapter is None or not sure:
        return core, None, adapted
    given = config.init_adapter
    start = found.attempt(lambda: warm_start(given, skeleton, targets, config.method, names), "init_adapter", "method")
    return core, start, adapted


def _check_hooks(skeleton: nn.Module, targets: Sequence[str]) -> None:
    """Raises InputError for layers in which Opacus' hooks would take single tokens for examples."""
    if inside := in_mixtures(skeleton, targets):
        more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        raise InputError(
            f"--privacy-engine opacus: {inside[0]}{more} see the tokens of a mixture of experts without their rows, so "
            "its hooks would take each token for an example; choose cohort, or leave these layers out by --targets"
        )


def _training(config: SimulationConfig) -> LocalTraining:
    row = METHODS[config.method]
    return LocalTraining(
        epochs=config.local_epochs or 1,
        steps=config.local_steps,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        lr=config.lr if config.lr is not None else row.lr,
        head_lr=config.head_lr if config.head_lr is not None else row.head_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm if config.privacy == "none" else None,  # else it bounds what one unit contributes
        optimizer_state=config.optimizer_state,
    )


def _check_one_shape(skeleton: nn.Module, targets: list[str]) -> None:
    try:
        check_one_shape([(name, skeleton.get_submodule(name)) for name in targets])
    except ValueError as error:
        raise InputError(f"--tie all: {error}") from error


def _core(config: SimulationConfig, targets: list[str], patterns: Patterns | None) -> CoreConfig:
    try:
        return CoreConfig(
            method=config.method,
            r=config.rank,
            alpha=config.alpha,
            use_rslora=config.rslora,
            rank_pattern=dict(patterns.ranks) if patterns else {},
            alpha_pattern=dict(patterns.alphas) if patterns else {},
            basis=config.basis,
            tie=config.tie,
            core=config.core,
            seed=config.seed,
            target_modules=targets,
        )
    except ValueError as error:
        raise InputError(f"--method {config.method}: {error}") from error


def _public_source(config: SimulationConfig, task: Task, own_task: OwnTask | None) -> Source:
    """What --public-data names, fit for the task. Raises InputError where it is not."""
    name = f"--public-data {config.public_data}"
    try:
        names = replace(columns_of(config, own_task=own_task is not None), client=None, grouped=None)
        source = load_source(str(config.public_data), seed=config.seed, names=names)
        if own_task is not None:
            source, _ = apply_task(own_task, source)
        if "messages" in task.columns:
            source = source.as_conversations(task.columns)
        missing = [column for column in task.columns if column not in source.train.column_names]
        if missing or (task.headed and "label" not in source.train.column_names):
            wanted = " + ".join([*task.columns, *(["label"] if task.headed else [])])
            there = ", ".join(source.train.column_names)
            raise InputError(f"{name}: it needs the columns that the data are read as, {wanted}; it has {there}")
        resolve_task(task.kind, source, task.label_names or None, joined=config.join_labels)
        task.labels(source.train, partial(source.place, "train"))
    except InputError as error:
        raise InputError([problem.replace("--data", name.split()[0], 1) for problem in error.problems]) from error
    return source


def _deal(
    config: SimulationConfig, rule: str, source: Source, labels: Labels, texts: Sequence[str] = ()
) -> tuple[Rows, list[Rows], Groups | None]:
    """The public rows, those of each client, and the groups of all where they are dealt by groups.

    texts: the columns that the task reads, for rules that look at them.
    """
    # Rows withheld from private data are as private as the rest: they would be no public examples.
    withheld = config.public_examples if config.privacy == "none" and config.public_data is None else 0
    tested = {"held out to test": len(source.test) if source.drawn else 0}
    public, private = withhold_public(withheld, len(source.train), config.seed, tested)
    by, column = groups_of(rule, source.train, texts, config.seed), column_of(rule)
    whole = [source.train, *([source.test] if source.drawn else [])]
    named = by is None and column is not None and all(column in rows.column_names for rows in whole)
    try:
        parts = partition(
            rule,
            source.train.select(private),
            labels[private],
            clients=config.clients,
            seed=config.seed,
            max_examples=config.max_examples,
            withheld=tested | {"public examples": withheld},
            groups=[value for rows in whole for value in rows[str(column)][:]] if named else (),
            by=None if by is None else replace(by, of=by.of[private]),
        )
    except InputError as error:
        if config.partition is not None or rule != "natural":
            raise
        unasked = "; natural is the default where there is a column client, or give --partition iid"
        raise InputError([f"{problem}{unasked}" for problem in error.problems]) from error
    return public, [private[part] for part in parts], by


def hold_back(parts: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """(rows to train on, rows to be evaluated on) of each client: a seeded share of its rows, rounded.

    At least one of either, where a client has two; its only row is for training. Raises InputError where none has two.
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
    if not any(map(len, held)):
        raise InputError(
            f"--client-eval {share}: no client has more than one example, so none can be held back; "
            "give --clients a smaller number, or --max-examples a larger one"
        )
    return kept, held


def _test_rows(config: SimulationConfig, count: int) -> Rows:
    """Those of the test split that are evaluated on, of so many."""
    if not 0 < config.eval_examples < count:
        return np.arange(count)
    return np.sort(generator(config.seed, "evaluation").choice(count, config.eval_examples, replace=False))
