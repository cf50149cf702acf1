"""What a configuration will need, reckoned from its checked parts by the code of a run, without weights or training."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlotr.adapters.experts import Experts, slots
from fedlotr.adapters.layer import widths
from fedlotr.adapters.tuner import CoreConfig, bases_of
from fedlotr.config.configuration import SimulationConfig
from fedlotr.cost.formulas import WIRE_BYTES
from fedlotr.errors import shorten
from fedlotr.fleet.availability import Always
from fedlotr.fleet.draws import Known
from fedlotr.flower.round import draw_clients
from fedlotr.models.checkpointing import blocks
from fedlotr.models.gguf import origin_of, sha256_of
from fedlotr.models.loading import count_parameters, linear_layers, load_base
from fedlotr.models.source import PACKAGED
from fedlotr.models.supported import form_of_weights
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.documents import TextsSeen
from fedlotr.run.checking import Checked
from fedlotr.run.federation import fleet_of, public_of, sampler_of
from fedlotr.run.fitting_texts import what_is_seen
from fedlotr.run.summary import owed
from fedlotr.training.cohort import cut_cohorts
from fedlotr.training.frozen_prefix import KEPT_BYTES
from fedlotr.training.model import TrainableModel
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
    work_bytes: of the files in the run directory while it goes on. asked: clients that train in a round, in vain or
    not. whole_rounds: in virtual time it cannot be known who takes part, and the bill is of rounds in which all who are
    asked answer. derived_tokens: that a client computes the gradient of for each of the derived_versions of the bases,
    as many as there are by the last round, where it makes them.
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
    asked: int
    whole_rounds: bool
    derived_tokens: int = 0
    derived_versions: int = 0


def forecast(checked: Checked, baseline: int) -> Forecast:
    """Reckon it. checked.config: resolved. baseline: memory of a process that has loaded the libraries."""
    config = checked.config
    model = architecture(checked)
    sizes = model.sizes()
    payload = WIRE_BYTES * sum(sizes.values())
    head = sum(sizes[name] for name in model.head_names)
    each = _asked(config)
    rounds = _rounds(checked, each)
    up: float = 0
    down: float = 0
    sent: float = 0
    one_off = participants = carried = 0
    if config.baseline is None:  # a baseline sends nothing
        bill = owed(checked, model, rounds)
        up, down = bill.round_up, sum(bill.downs) / bill.messages
        whole = owed(checked, model, rounds, controls=True)
        sent = (sum(whole.ups) + sum(whole.downs)) / whole.messages
        one_off, carried = bill.one_off, bill.carried
        participants = bill.clients if len(rounds) == config.rounds else config.clients
    work = [checked.training.examples_of(len(part)) for part in checked.parts]
    examples = each * sum(work) / len(work)
    lengths = _mean_lengths(checked, rounds[0])
    batch = checked.training.batch_size
    steps = [round(length * min(len(checked.parts[client]), batch)) for client, length in lengths.items()]
    cohorts = cut_cohorts(steps, None if config.cohort == "auto" else config.cohort)
    width = 2 if config.dtype == "bfloat16" else WIRE_BYTES
    weights = _weights(checked, model.module, width)
    largest = max(piece.stop - piece.start for piece in cohorts)
    computing = weights + largest * COPIES_OF_TRAINED * payload + _activations(model, width)
    computing += 0 if model.prefix is None else KEPT_BYTES
    kept = payload * (config.coding.update.lossy + config.coding.broadcast.delta)
    basis = WIRE_BYTES * sum(factor.numel() for pair in bases_of(model.module).values() for factor in pair)
    return Forecast(
        parameters=count_parameters(model.module),
        trained_adapter=sum(sizes.values()) - head,
        trained_head=head,
        upload_bytes=up,
        download_bytes=down,
        one_off_bytes=one_off,
        participants=participants,
        total_bytes=round(each * config.rounds * sent + participants * one_off),
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
        work_bytes=6 * (payload + carried)
        + 2 * kept * participants
        + 3 * basis
        + 4 * config.longest * (sum(map(len, checked.parts)) + 1),
        asked=each,
        whole_rounds=not _foreseen(config),
        **_derived(checked),
    )


def _asked(config: SimulationConfig) -> int:
    """Clients that are sent something in a round; in async, once as many as train at a time do, as many as answer."""
    return config.updates_per_round if config.mode == "async" else config.asked


def _foreseen(config: SimulationConfig) -> bool:
    """Whether it is known before a run who takes part in its rounds: all are there and wait for all."""
    if not config.virtual:
        return True
    fleet = fleet_of(config)
    return config.mode == "sync" and isinstance(fleet.availability, Always) and not any(fleet.dropouts)


def _derived(checked: Checked) -> dict[str, int]:
    config = checked.config
    if not config.derive_bases:
        return {}
    examples, rows = public_of(checked)
    moved = 0 if config.moves is None or config.moves.move.derivable else config.moves.versions(config.rounds - 1)
    first = checked.core is not None and not checked.core.basis_kind.derivable
    return {"derived_tokens": int(examples.lengths[rows].sum()), "derived_versions": moved + first}


def _weights(checked: Checked, module: torch.nn.Module, width: int) -> int:
    """Bytes of the base as it is kept in memory. width: of a number that is not quantised."""
    quantize, plain = checked.config.quantize, width * count_parameters(module)
    form = quantize if quantize != "none" else form_of_weights(Path(checked.spec.path))
    if form == "none":
        return plain
    experts = slots(module)  # which stay as they are
    matrices = [widths(module.get_submodule(name)) for name in linear_layers(module) if name not in experts]
    return plain + round(sum(d_in * d_out for d_in, d_out in matrices) * (BYTES_OF_QUANTISED[form] - width))


def architecture(checked: Checked) -> TrainableModel:
    """The model that clients train, on the meta device: shapes alone."""
    spec, core = checked.spec, checked.core
    with torch.device("meta"):
        return TrainableModel(load_base(spec, meta=True), spec, None if core is None else _without_bases(core))


def _without_bases(core: CoreConfig) -> CoreConfig:
    """The same shapes; no basis is made, as for a saved adapter whose bases come with its state."""
    same = copy(core)
    same.bases = None
    return same


def _rounds(checked: Checked, each: int) -> list[list[int]]:
    """The clients of each round, as the run draws them; of the first rounds where there are very many.

    By loss, which nobody knows before: as if all who took part had told the same.
    """
    config, rounds = checked.config, list[list[int]]()
    asked = len(checked.parts), each, config.seed
    sampler, known = sampler_of(config, checked.parts), Known.nothing(len(checked.parts))
    for number in range(min(config.rounds, MOST_ROUNDS)):
        rounds.append(list(draw_clients(*asked, number + 1, sampler, known)))
        known = known.after(rounds[-1], {})
    return rounds


def _mean_lengths(checked: Checked, clients: Sequence[int]) -> dict[int, float]:
    """Tokens of a client's mean example."""
    lengths = checked.examples.train.examples.lengths
    return {client: float(lengths[checked.parts[client]].mean()) for client in clients}


def texts(checked: Checked) -> TextsSeen:
    """How much of the texts the model sees, as a run reckons it."""
    examples = checked.examples
    return what_is_seen(checked.config, examples.train, checked.parts, examples.test)


def _activations(model: TrainableModel, width: int) -> int:
    """Bytes that one pass keeps for its backward."""
    tokens = model.pass_tokens(RAGGED_TOKENS if model.takes_ragged else PASS_TOKENS)
    config = model.module.config
    seen = int(getattr(config, "num_experts_per_tok", 1))
    through = _widths_in(model.module, seen)
    if model.spec.checkpointed:  # each block's input, and what is inside the one that runs again
        inside = [_widths_in(part, seen) for part in blocks(model.module)]
        through += max(inside) - sum(inside) + len(inside) * int(getattr(config, "hidden_size", 0))
    return tokens * through * width * ACTIVATIONS + 4 * model.held_logits * 2


def _widths_in(module: torch.nn.Module, experts: int) -> int:
    """Of the inputs and outputs of all matrices that a token meets together. experts: of a block, that it goes to."""
    mixtures = [part for part in module.modules() if isinstance(part, Experts)]
    idle = sum(_all_widths(part) * max(len(part) - experts, 0) // len(part) for part in mixtures)
    return _all_widths(module) - idle


def _all_widths(module: torch.nn.Module) -> int:
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
    origin = origin_of(folder)
    made = "" if origin is None else f" made of {shorten(origin.file)}"
    published = ""
    if (known := PACKAGED.get(checked.config.model)) is not None:
        weights = folder / known.file
        found = sha256_of(weights) if weights.is_file() else "" if origin is None else origin.sha256
        same = found == known.sha256
        published = f", SHA-256 {'as' if same else 'not the'} published{'' if same else ' one'}" if found else ""
    return f"{readable_bytes(size)} of safetensors{made}{published}, in {shorten(folder)}"
