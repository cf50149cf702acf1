"""Examples as the model sees them, for `--show-examples`: what is learnt of each stands between ⟦ and ⟧."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from fedlotr.errors import visible
from fedlotr.run.checking import Checked
from fedlotr.training.examples import Examples

OPEN, CLOSE = "⟦", "⟧"
"""Around what is learnt."""


def shown_examples(checked: Checked, count: int) -> Iterator[str]:
    """The first examples of the first client, each a line that says what it is, and the lines of its text."""
    examples = checked.examples.train.examples
    for number, row in enumerate(checked.parts[0][:count].tolist(), start=1):
        tokens = examples.tokens[examples.offsets[row] : examples.offsets[row + 1]]
        learnt = _learnt(examples, row)
        if checked.task.kind == "causal-lm":
            what = f"{int(learnt.sum())} of them learnt, between {OPEN} and {CLOSE}"
        else:
            label = examples.labels[row]
            what = f"label {f'{label:g}' if checked.task.scale else checked.task.label_names[int(label)]}"
        if cut := int(checked.examples.train.seen.cut[row]):
            what += f"; {cut:,} of the row's are cut"
        of = checked.source.place("train", row).removeprefix("--data: ")
        yield f"example {number} of client 0 ({visible(of)}): {len(tokens)} tokens, {what}"
        yield from (f"  {visible(line)}" for line in _marked(checked, tokens.tolist(), learnt).split("\n"))


def _learnt(examples: Examples, row: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(tokens,) which of an example's are targets."""
    start, stop = examples.offsets[row], examples.offsets[row + 1]
    if not examples.causal:
        return np.zeros(stop - start, bool)
    after = np.arange(stop - start) >= max(int(examples.labels[row]), 1)
    return after if examples.targets is None else after & examples.targets[start:stop]


def _marked(checked: Checked, tokens: list[int], learnt: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    """The text of the tokens, decoded together so that each is written as it stands in it."""
    text, at, shown = "", 0, []
    for target, group in groupby(learnt.tolist()):
        at += len(list(group))
        whole = checked.tokenizer.decode(tokens[:at], skip_special_tokens=False)
        assert isinstance(whole, str)
        piece, text = whole[len(text) :], whole
        shown.append(f"{OPEN}{piece}{CLOSE}" if target else piece)
    return "".join(shown)
