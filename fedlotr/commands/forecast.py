"""What a configuration will need, reckoned from its checked parts by the code of a run, without weights or training."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.layer import widths
from fedlotr.adapters.tuner import CoreConfig, bases_of, factored_layers
from fedlotr.communication.ledger import payload_bytes
from fedlotr.communication.wire_form import UNCODED, WireForm
from fedlotr.cost.formulas import WIRE_BYTES, coded_bytes
from fedlotr.data import encode
from fedlotr.errors import shorten
from fedlotr.flower.federation import Federation
from fedlotr.flower.links.ranks import block
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import derivable_record
from fedlotr.flower.round import sample_clients
from fedlotr.flower.traits import traits_of
from fedlotr.models.checkpointing import blocks
from fedlotr.models.loading import count_parameters, linear_layers, load_base
from fedlotr.models.source import DEMO_MODEL, DEMO_SHA256
from fedlotr.models.supported import form_of_weights
from fedlotr.reporting.console import readable_bytes
from fedlotr.run.checking import Checked
from fedlotr.run.federation import ranks_of
from fedlotr.training.cohort import cut_cohorts
from fedlotr.training.frozen_prefix import KEPT_BYTES
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.packing import PASS_TOKENS
from fedlotr.training.varlen_pass import RAGGED_TOKENS

COPIES_OF_TRAINED = 4
"""What a client in a cohort keeps of each trained number: its value, its gradient, and two moments of AdamW."""
ACTIVATIONS = 3
"""Numbers kept for the backward by a layer and what follows it (attention, norms, copies), for each of its inputs and
outputs and each token of a pass. A rough upper figure: with it the default run is foretold 1.7 GB a process, and its
workers were seen to take 1.4 GB."""
BYTES_OF_QUANTISED = {"8bit": 1.01, "4bit": 0.52}
"""Of one number, with its share of the scales of rows and blocks."""
MOST_ROUNDS = 2000
"""Rounds whose samples are drawn to count the clients that ever take part."""
MOST_ROWS = 20_000
"""Rows that are tokenised to see how long they are."""


@dataclass(frozen=True)
class Forecast:
    """Of a run. Bytes on the wire are the payload, numbers times their width, as in summary.json.

    participants: clients that take part at least once. one_off_bytes: what each of them receives once.
    cohorts: of the first round. *_a_round: means. process_bytes: memory of one process, a rough upper figure;
    device_bytes: the part of it that the model and its training take, which on a GPU is that one's memory.
    work_bytes: of the files in the run directory while it goes on.
    """

    parameters: int
    trained_adapter: int
    trained_head: int
    upload_bytes: float
    download_bytes: float
    one_off_bytes: int
    participants: int
    total_bytes: int
    examples_a_round: float
    tokens_a_round: float
    cohorts: int
    processes: int
    weights_bytes: int
    process_bytes: int
    device_bytes: int
    work_bytes: int


def forecast(checked: Checked, baseline: int) -> Forecast:
    """Reckon it. checked.config: resolved. baseline: memory of a process that has loaded the libraries.

    What a strategy decides as it goes is not foreseen: where it lowers clients' ranks (HetLoRA), less will cross.
    """
    config = checked.config
    model = architecture(checked)
    sizes = model.sizes()
    head = sum(sizes[name] for name in model.head_names)
    payload = WIRE_BYTES * sum(sizes.values())
    ranks = ranks_of(config)
    bases = bases_of(model.module)
    one_off = 0
    basis_bytes = WIRE_BYTES * sum(factor.numel() for pair in bases.values() for factor in pair)
    if bases and checked.core is not None:
        derivable = checked.core.basis_kind.derivable
        one_off = payload_bytes(derivable_record(config.seed, "00" * 32)) if derivable else basis_bytes
    rounds = _rounds(checked)
    kept = payload * (config.coding.update.lossy + config.coding.broadcast.delta)
    merged, held = _carried_bytes(checked, model, rounds, ranks)
    published = frozenset(model.published)
    spoken_to = sum(map(len, rounds))
    bytes_of = partial(_bytes_of, model.values(), {})
    ups = downs = 0
    update, broadcast = config.coding.update, config.coding.broadcast
    holding: set[int] = set()
    for number, clients in enumerate(rounds, start=1):
        moving = model.moving(number) & published
        for client in clients:
            rank = None if ranks is None else ranks[client]
            ups += bytes_of(moving, rank, update)
            whole = broadcast.delta and client not in holding
            downs += bytes_of(published, rank, UNCODED.broadcast if whole else broadcast)
        holding.update(clients)
    up, down = ups / spoken_to, (downs + sum(merged)) / spoken_to
    participants = len(set().union(*rounds)) if len(rounds) == config.rounds else config.clients
    work = [checked.training.examples_of(len(part)) for part in checked.parts]
    examples = config.clients_per_round * sum(work) / len(work)
    lengths = _mean_lengths(checked, rounds[0])
    steps = [
        round(lengths[client] * min(len(checked.parts[client]), checked.training.batch_size)) for client in rounds[0]
    ]
    cohorts = cut_cohorts(steps, None if config.cohort == "auto" else config.cohort)
    parameters = count_parameters(model.module)
    width = 2 if config.dtype == "bfloat16" else WIRE_BYTES
    largest = max(piece.stop - piece.start for piece in cohorts)
    form = config.quantize if config.quantize != "none" else form_of_weights(Path(checked.spec.path))
    weights = width * parameters + _stored_in_fewer(model.module, form, width)
    computing = weights + largest * COPIES_OF_TRAINED * payload + _activations(model, width)
    computing += 0 if model.prefix is None else KEPT_BYTES
    if config.baseline is not None:  # nothing is sent
        up, down, one_off, participants = 0, 0, 0, 0
    return Forecast(
        parameters=parameters,
        trained_adapter=sum(sizes.values()) - head,
        trained_head=head,
        upload_bytes=up,
        download_bytes=down,
        one_off_bytes=one_off,
        participants=participants,
        total_bytes=round(config.clients_per_round * config.rounds * (up + down) + participants * one_off),
        examples_a_round=examples,
        tokens_a_round=examples * sum(lengths.values()) / len(lengths),
        cohorts=len(cohorts),
        processes=1 if config.engine == "local" else 1 + (config.workers or 1),
        weights_bytes=weights,
        process_bytes=baseline + (0 if config.device == "cuda" else computing),
        device_bytes=computing,
        # Two checkpoints with a strategy's state as large again, the adapter as plain LoRA, the bases, the tokens; the
        # carried term in two checkpoints, in two versions on the clients' disks, and in the adapter. What codecs have
        # every client keep is in two checkpoints.
        work_bytes=6 * (payload + held)
        + 2 * kept * participants
        + 3 * basis_bytes
        + 4 * config.max_length * (sum(map(len, checked.parts)) + 1),
    )


def _stored_in_fewer(module: torch.nn.Module, form: str, width: int) -> int:
    """Bytes that quantised linear layers take beyond those of plain ones: below zero. width: of a plain number."""
    if form == "none":
        return 0
    matrices = [widths(module.get_submodule(name)) for name in linear_layers(module)]
    return round(sum(d_in * d_out for d_in, d_out in matrices) * (BYTES_OF_QUANTISED[form] - width))


def architecture(checked: Checked) -> TrainableModel:
    """The model that clients train, on the meta device: shapes alone."""
    spec, core = checked.spec, checked.core
    with torch.device("meta"):
        return TrainableModel(load_base(spec, meta=True), spec, None if core is None else _without_bases(core))


def _bytes_of(
    values: Tensors,
    known: dict[tuple[frozenset[str], int | None, WireForm], int],
    names: frozenset[str],
    rank: int | None,
    form: WireForm,
) -> int:
    """Of a message with these tensors to or from a client of a rank (None: the run's); with zstd at most so many."""
    if (names, rank, form) not in known:
        parts = [values[name] if rank is None else block(name, values[name], rank) for name in names]
        known[names, rank, form] = coded_bytes(form, [part.numel() for part in parts])
    return known[names, rank, form]


def _carried_bytes(
    checked: Checked, model: TrainableModel, rounds: Sequence[Sequence[int]], ranks: Sequence[int] | None
) -> tuple[list[int], int]:
    """Bytes of the carried term that all clients of each round are sent, and its bytes in the end.

    By the run's own rules, on the meta device; layers of one shape are alike.
    """
    config = checked.config
    if config.baseline is not None:
        return [0] * len(rounds), 0
    strategy = load_strategy(str(config.strategy), config.strategy_arg, config.clients_per_round, config.seed)
    own = [[config.rank if ranks is None else ranks[client] for client in clients] for clients in rounds]
    adds = [traits_of(strategy).merges(present) for present in own]
    if not any(adds):
        return [0] * len(rounds), 0
    started = {} if checked.start is None else checked.start.layers
    kinds = Counter(
        (*widths(layer), len(started[name].A) if name in started else 0)
        for name, layer in factored_layers(model.module).items()
    )

    def meta(k: int, d_in: int, d_out: int) -> Factors:
        return Factors(torch.empty(k, d_in, device="meta"), torch.empty(d_out, k, device="meta"))

    carry = Carry.start({str(kind): meta(kind[2], *kind[:2]) for kind in kinds if kind[2]})
    holds: dict[int, int] = {}
    sent = []
    for clients, added in zip(rounds, adds, strict=True):
        numbers: dict[int, int] = {}
        for since in {holds.get(client, 0) for client in clients}:
            parts = {name: tensor.numel() for name, tensor in carry.missed(since).items()}
            numbers[since] = sum(
                count * sum(size for name, size in parts.items() if name.startswith(str(kind)))
                for kind, count in kinds.items()
            )
        sent.append(WIRE_BYTES * sum(numbers[holds.get(client, 0)] for client in clients))
        holds |= dict.fromkeys(clients, carry.version)
        carry = carry.grown({str(kind): meta(added, *kind[:2]) for kind in kinds})
    held = {kind: sum(tensor.numel() for tensor in carry.terms[str(kind)].tensors()) for kind in kinds}
    return sent, WIRE_BYTES * sum(count * held[kind] for kind, count in kinds.items())


def _without_bases(core: CoreConfig) -> CoreConfig:
    """The same shapes; no basis is made, as for a saved adapter whose bases come with its state."""
    same = copy(core)
    same.bases = None
    return same


def _rounds(checked: Checked) -> list[list[int]]:
    """The clients of each round, as the run draws them; of the first rounds where there are very many."""
    config = checked.config
    federation = Federation(
        clients=len(checked.parts),
        sampled=config.clients_per_round,
        rounds=config.rounds,
        seed=config.seed,
        max_failed=config.max_failed,
        lr_factor=lambda _: 1.0,
        basis=None,
        bases_sha256="",
        layers=(),
        held_out=len(checked.test_rows),
        causal=checked.task.kind == "causal-lm",
        method=config.method,
    )
    return [sample_clients(federation, number + 1) for number in range(min(config.rounds, MOST_ROUNDS))]


def _mean_lengths(checked: Checked, clients: Sequence[int]) -> dict[int, float]:
    """Tokens of a client's mean example; of its first ones where all together are very many."""
    most = max(1, MOST_ROWS // len(clients))
    rows = [checked.parts[client][:most] for client in clients]
    chosen = checked.source.train.select([row for part in rows for row in part.tolist()])
    lengths = encode(checked.task, chosen, checked.tokenizer, checked.config.max_length).lengths
    means, at = {}, 0
    for client, part in zip(clients, rows, strict=True):
        means[client] = float(lengths[at : at + len(part)].mean())
        at += len(part)
    return means


def _activations(model: TrainableModel, width: int) -> int:
    """Bytes that one pass keeps for its backward."""
    tokens = RAGGED_TOKENS if model.takes_ragged else model.pass_tokens(PASS_TOKENS)
    through = _widths_in(model.module)
    if model.spec.checkpointed:  # each block's input, and what is inside the one that runs again
        inside = [_widths_in(part) for part in blocks(model.module)]
        through += max(inside) - sum(inside) + len(inside) * int(getattr(model.module.config, "hidden_size", 0))
    return tokens * through * width * ACTIVATIONS + 4 * model.held_logits * 2


def _widths_in(module: torch.nn.Module) -> int:
    """Of all matrices' inputs and outputs together."""
    weights = [(part, getattr(part, "weight", None)) for part in module.modules()]
    return sum(
        sum(weight.shape)
        for part, weight in weights
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(part, torch.nn.Embedding)
    )


def weights_on_disk(checked: Checked) -> str:
    """Where a model's weights lie, how large they are, and whether they are the published ones where that is known."""
    folder = Path(checked.spec.path)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    published = ""
    weights = folder / "model.safetensors"
    if checked.config.model == DEMO_MODEL and weights.is_file():
        with open(weights, "rb") as content:
            same = hashlib.file_digest(content, "sha256").hexdigest() == DEMO_SHA256
        published = ", SHA-256 as published" if same else ", SHA-256 not the published one"
    return f"{readable_bytes(size)} of safetensors{published}, in {shorten(folder)}"
