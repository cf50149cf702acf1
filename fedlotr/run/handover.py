"""A run's model as a folder for others: adapter, merged weights or card, without a path of this machine."""

import ast
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlotr.adapters.reduce import pad_adapter, reduce_adapter
from fedlotr.adapters.start import CONFIG, HEAD, LABELS, WEIGHTS, labels_of
from fedlotr.config.configuration import SimulationConfig
from fedlotr.config.own import is_own
from fedlotr.errors import InputError, shorten
from fedlotr.files import GGUF, write_atomically
from fedlotr.models.source import PACKAGED, gguf_file, hub_name
from fedlotr.reporting.card import Card
from fedlotr.reporting.run_record import read_run
from fedlotr.run.export import elsewhere, line_of, render
from fedlotr.run.merged import merge
from fedlotr.run.rebuilt import adapter_of, configuration_of, round_of

README = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""ORG/NAME, as a card may name a base."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a run.

    to: peft, merged, card or hub, which is sent what peft makes. number: the round, or the last where None. rank: the
    most that a layer may have. uniform: whether all layers get one. dtype: of merged weights. base: what others call
    the base. model, data: where these lie now.
    """

    run: Path
    to: str
    number: int | None = None
    rank: int | None = None
    uniform: bool = False
    dtype: str = "float32"
    base: str | None = None
    model: str | None = None
    data: str | None = None


@contextmanager
def handed_over(wanted: Wanted, beside: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder with all that is handed over, and what is to be said of it; it goes at the end, if it is still there.

    beside: a folder on the disk where the result is to stay.
    Raises InputError for what is no run, or cannot be handed over so.
    """
    config, record = configuration_of(wanted.run, wanted.model, wanted.data), read_run(wanted.run)
    number = round_of(record, wanted.number)
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fedlotr-", dir=beside, ignore_cleanup_errors=True) as place:
        made, folder = Path(place) / "made", Path(place) / "folder"
        made.mkdir()
        folder.mkdir()
        source = adapter_of(wanted.run, config, wanted.number, made)
        for name in (CONFIG, WEIGHTS, HEAD, LABELS):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        notes = []
        if wanted.rank is not None:
            notes.append(reduce_adapter(folder, wanted.rank).in_words())
        if wanted.uniform:
            notes.append(f"all layers are filled up with zeros to rank {pad_adapter(folder)}, which changes nothing")
        readme = (source / README).read_text(encoding="utf-8")
        name, base_id = _base(
            config, str(ast.literal_eval(line_of(readme, "base, adapter") or '("", "")')[0]), wanted.base
        )
        card = Card(record, number, name, base_id=base_id, notes=tuple(notes))
        if wanted.to == "merged":
            plain = Path(place) / "merged"
            _write_merged(plain, folder, config, card, readme, wanted.dtype)
            folder = plain
        else:
            _write_peft(folder, config, card, readme, uniform=wanted.uniform)
        if wanted.to == "card":
            for file in folder.iterdir():
                if file.name != README:
                    file.unlink()
        yield folder, notes


def keep(folder: Path, out: Path) -> None:
    """Give a finished folder its place. Raises InputError where something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {shorten(out)}: there is something already; remove it, or give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        out.rmdir()
    folder.replace(out)
    out.chmod(0o755)


def _base(config: SimulationConfig, source: str, given: str | None) -> tuple[str, str | None]:
    """What others call a base, and its id on the hub, if it is known to have one.

    source: the folder that it was loaded from. given: what the user calls it.
    """
    if given is not None:
        return given, given if HUB_ID.fullmatch(given) else None
    model = config.model
    if model in PACKAGED or f"models--{model.replace('/', '--')}" in Path(source).parts:
        return hub_name(model), hub_name(model)
    return model if is_own(model) else Path(model).expanduser().name, None


def _write_peft(folder: Path, config: SimulationConfig, card: Card, readme: str, *, uniform: bool) -> None:
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = card.base
    write_atomically(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True))
    made_there = is_own(config.model) or config.model.endswith(GGUF) or gguf_file(config.model) is not None
    text = elsewhere(readme, hub_name(config.model), card.base, own=made_there, uniform=uniform)
    write_atomically(folder / README, f"{card.header('peft')}\n{text}\n{card.body()}")


def _write_merged(folder: Path, adapter: Path, config: SimulationConfig, card: Card, readme: str, dtype: str) -> None:
    found = merge(adapter, config.model, card.task, config.quantize)
    folder.mkdir()
    found.save(folder, dtype)
    if found.head is not None and (adapter / LABELS).is_file():
        shutil.copyfile(adapter / LABELS, folder / LABELS)
    inputs = line_of(readme, "tokenizer.model_input_names")
    texts = line_of(readme, "texts")
    text = render(
        "merged.md",
        base=card.base,
        dtype=dtype,
        causal=card.task == "causal-lm",
        mean_pooled=found.head is not None,
        labels=labels_of(adapter),
        inputs=ast.literal_eval(inputs) if inputs else None,
        texts=ast.literal_eval(texts) if texts else None,
        max_length=config.longest,
    )
    write_atomically(folder / README, f"{card.header('transformers')}\n{text}\n{card.body()}")
