"""The rows that a run uses, tokenised once: which of them are examples, how long these may be, and what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Encoded, Groups, Source, Style, Task, encode_rows
from fedlotr.data.labels import Labels
from fedlotr.errors import InputError, shorten
from fedlotr.models.limits import tokens_beyond
from fedlotr.run.poison import Poison
from fedlotr.training.examples import Examples
from fedlotr.training.packing import Rows


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Rows of a source's train split, and who has them. labels: (rows,) of all rows; groups: theirs, if
    they were dealt by some.

    public: those withheld from all clients, unless `public_source` has them; parts: each client's to train on;
    held_back: each client's to be evaluated on by itself. test_rows: of the test split.
    """

    source: Source
    labels: Labels
    public: Rows
    parts: Sequence[Rows]
    held_back: Sequence[Rows]
    test_rows: Rows
    public_source: Source | None = None
    groups: Groups | None = None


@dataclass(frozen=True)
class Tokenised:
    """What `Dealt` names, as examples. train: of clients and, where there is no `shown`, public; shown: of public data.

    cut: what is to be said of rows that are too long, or of which nothing is left.
    """

    train: Encoded
    test: Encoded
    shown: Encoded | None = None


def tokenised(
    config: SimulationConfig, task: Task, tokenizer: PreTrainedTokenizerBase, dealt: Dealt, positions: int | None
) -> tuple[Tokenised, Dealt, int]:
    """The examples, the rows and their owners as numbers of examples, and the length that was taken.

    An example is a row from here on: of the source's train there are left those that are used, in their order, one for
    each example, so that a conversation may be several and one that has no room is none. Its test is as it was.

    positions: that the model has, as far as is known: what `--max-length auto` takes at most.
    Raises InputError for rows that are no examples, and where a client has none left.
    """
    style = style_of(config)
    public = dealt.public if dealt.public_source is None else dealt.public[:0]
    used = np.unique(np.concatenate([*dealt.parts, *dealt.held_back, public]))
    poison = Poison.of(config, dealt.parts)
    dealt = replace(dealt, source=poison.source(dealt.source, task))
    splits = [(dealt.source, "train", used), (dealt.source, "test", dealt.test_rows)]
    if dealt.public_source is not None:
        splits.append((dealt.public_source, "train", dealt.public))
    limit = positions if config.max_length == "auto" else config.max_length
    made = [_encoded(config, task, tokenizer, *split, limit, style) for split in splits]
    if config.max_length == "auto":
        limit = max(2, *(int(one.examples.lengths.max(initial=0)) for one in made))
    assert limit is not None
    train, test, *shown = made
    rows = used[train.owner]
    train = poison.encoded(train, rows, task)
    parts, held_back = (_numbered(rows, them) for them in (dealt.parts, dealt.held_back))
    _check_all_have_some(config, parts, dealt.parts)
    if not len(test.owner):
        raise InputError(f"--max-length {limit}: no row of {dealt.source.test_split} has room; give a larger one")
    known = replace(
        dealt,
        source=replace(
            dealt.source,
            train=dealt.source.train.select(rows),
            train_places=dealt.source.places("train").take(rows),
        ),
        labels=dealt.labels[rows],
        public=_numbered(rows, [public])[0] if dealt.public_source is None else np.arange(len(shown[0].owner)),
        parts=parts,
        held_back=held_back,
        test_rows=dealt.test_rows[test.owner],
        groups=None if dealt.groups is None else replace(dealt.groups, of=dealt.groups.of[rows]),
    )
    return Tokenised(train, test, shown[0] if shown else None), known, limit


def encode_one(config: SimulationConfig, task: Task, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where no text at all would have room, or there is no such template."""
    limit = None if config.max_length == "auto" else config.max_length
    _encoded(config, task, tokenizer, source, "train", np.arange(1), limit, style_of(config))


def style_of(config: SimulationConfig) -> Style:
    """How a language model's rows are written out."""
    return Style(template=config.template, train_on=config.train_on, date=config.date, eos=config.eos)


def _encoded(
    config: SimulationConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    split: str,
    rows: Rows,
    limit: int | None,
    style: Style,
) -> Encoded:
    """These rows of a split as examples. Raises InputError that names the row which is none."""
    held = source.train if split == "train" else source.test
    told = config.privacy == "none"

    def place(row: int) -> str:
        if told or split == "test":
            return source.place(split, int(rows[row]))
        return f"--data {source.name}, train: some row"

    hidden = not told and split == "train"
    return encode_rows(task, held.select(rows), tokenizer, limit, style, place=place, several=told, hidden=hidden)


def _numbered(examples: Rows, them: Sequence[Rows]) -> list[Rows]:
    """The examples that are of each one's rows. examples: (n,) the row of each, ascending."""
    each = []
    for rows in them:
        starts = np.searchsorted(examples, rows, "left")
        counts = np.searchsorted(examples, rows, "right") - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        each.append(np.repeat(starts, counts) + within)
    return each


def _check_all_have_some(config: SimulationConfig, parts: Sequence[Rows], before: Sequence[Rows]) -> None:
    bare = [client for client, (has, had) in enumerate(zip(parts, before, strict=True)) if len(had) and not len(has)]
    if bare and config.privacy != "none":
        raise InputError(f"--max-length {config.max_length}: some client has no example left; give a larger one")
    if bare:
        first = ", ".join(map(str, bare[:3])) + (", …" if len(bare) > 3 else "")
        raise InputError(
            f"--max-length {config.max_length}: {len(bare)} of {len(parts)} clients ({first}) have no example left: "
            "their prompts and answers have no room in it; give a larger one, or auto"
        )


def check_tokens(
    config: SimulationConfig,
    dealt: Dealt,
    found: Tokenised,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
) -> None:
    """Raise InputError where an example has a token that the model has no embedding for.

    dealt: as `tokenised` gives it. rows: of the model's embedding, where it tells. Tokens that no text has do no harm,
    such as an image's; the tokenizer is looked at only where some text has such a one.
    """
    for split, examples in (("train", found.train.examples), ("test", found.test.examples)):
        where = np.flatnonzero(examples.tokens >= (rows or np.iinfo(np.int32).max))
        if len(where):
            assert rows is not None
            raise InputError(
                _beyond(config, dealt, split, examples, int(where[0]), tokens_beyond(tokenizer, rows), rows)
            )


def _beyond(
    config: SimulationConfig, dealt: Dealt, split: str, examples: Examples, at: int, beyond: dict[int, str], rows: int
) -> str:
    token = shorten(beyond.get(int(examples.tokens[at]), str(examples.tokens[at])))
    row = int(np.searchsorted(examples.offsets, at, side="right")) - 1
    row = row if split == "train" else int(dealt.test_rows[row])
    where = "train" if split == "train" else dealt.source.test_split
    told = config.privacy == "none"
    of = f"{dealt.source.place(split, row)}: its token {token}" if told else f"{where}: some row's token"
    return (
        f"--model {config.model}: {of.removeprefix('--data: ')} has no embedding: the tokenizer has {len(beyond):,} "
        f"tokens beyond the model's {rows:,}; give the tokenizer that belongs to the model, or enlarge the model first "
        "(model.resize_token_embeddings(len(tokenizer))) and save it again"
    )
