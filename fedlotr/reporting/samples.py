"""samples.json as people read it: samples.md, what a page shows of it, and a few words for a terminal.

Prompts are users' data, and a model may say anything: nothing of either is a mark of Markdown, HTML or a terminal.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fedlotr.errors import visible
from fedlotr.reporting.documents import Asked, Said, Samples
from fedlotr.reporting.escaping import lines, markdown

JSON, MARKDOWN = "samples.json", "samples.md"
"""In a run's directory."""
TITLE = "What the model says"
NOTHING = "(nothing)"
SHOWN = 70
"""Characters of a text on a terminal."""


def samples_in(folder: Path, notes: list[str] | None = None) -> Samples | None:
    """What a run directory has; None where it has none, or what no run writes there, which is noted."""
    path, found = folder / JSON, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    if _is_whole(found):
        return cast(Samples, found)
    if notes is not None:
        notes.append(f"{path} makes no sense and is left out")
    return None


def _is_whole(found: Any) -> bool:
    """Whether all that is looked into is as a run writes it."""
    kinds: Mapping[str, type | tuple[type, ...]] = {
        **{"rows_of": str, "tokens": int, "prompts": list, "answers": list, "notes": list},
        **{"best": (int, type(None)), "last": (int, type(None))},
    }
    asked = {"row": int, "asked": str, "prompt": str, "left_out": int, "reference": str}
    return (
        _has(found, kinds)
        and all(_has(one, asked) for one in found["prompts"])
        and all(isinstance(note, str) for note in found["notes"])
        and all(
            _has(one, {"round": int, "said": list})
            and len(one["said"]) == len(found["prompts"])
            and all(_has(said, {"text": str, "ended": bool}) for said in one["said"])
            for one in found["answers"]
        )
    )


def _has(found: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())


def about(samples: Samples) -> str:
    """What is shown, in a sentence or two."""
    some = len(samples["prompts"])
    of = f"{some} row{'' if some == 1 else 's'} of {samples['rows_of']}"
    return (
        f"The same prompts, of {of} (drawn by the seed), before training, at the best round and at the end. The model "
        f"takes the likeliest token each time (greedy), {samples['tokens']} at most."
    )


def after(samples: Samples, number: int) -> str:
    """When the model of a round spoke, in words."""
    best, last = samples["best"], samples["last"]
    if number == 0:
        return "Before training"
    if number == last:
        return f"At the end (round {number}{', the best' if number == best else ''})"
    return f"At the best round ({number})"


def question(samples: Samples, at: int) -> list[tuple[str, str]]:
    """Of a prompt: itself and how the data go on, each under its title."""
    asked = samples["prompts"][at]
    return [(f"Prompt{_short(asked)}", _shown(asked["prompt"])), ("In the data", _shown(asked["reference"]))]


def answers(samples: Samples, at: int) -> list[tuple[str, str]]:
    """What the model says to a prompt, before training first, each under its title."""
    return [
        (f"{after(samples, one['round'])}{_cut(one['said'][at])}", _shown(one["said"][at]["text"]))
        for one in samples["answers"]
    ]


def _shown(text: str) -> str:
    return text if text.strip() else NOTHING


def _short(asked: Asked) -> str:
    return f" ({asked['left_out']} tokens of its middle left out)" if asked["left_out"] else ""


def _cut(said: Said) -> str:
    return "" if said["ended"] else ", cut off"


def name(samples: Samples, at: int) -> str:
    """Of a prompt: which row it is."""
    return f"Row {samples['prompts'][at]['row']} of {samples['rows_of']}"


def as_markdown(samples: Samples, run: str) -> str:
    """samples.md. run: what was trained, in a line."""
    parts = [f"# {TITLE}", markdown(run), markdown(about(samples)), *map(markdown, samples["notes"])]
    for at in range(len(samples["prompts"])):
        parts.append(f"## {markdown(name(samples, at))}")
        told = [*question(samples, at), *answers(samples, at)]
        parts += [f"{markdown(title)}:\n\n{_block(text)}" for title, text in told]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """As code on lines of its own; a fence longer than any in it, so that it ends where it ends."""
    shown = lines(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def in_short(samples: Samples) -> list[tuple[str, str]]:
    """The first prompt and what is said to it first and last, each a title and a line; nothing where there is none."""
    if not samples["prompts"] or not samples["answers"]:
        return []
    first, last = samples["answers"][0], samples["answers"][-1]
    said = [("asked", samples["prompts"][0]["asked"]), ("before", first["said"][0]["text"])]
    said += [("after", last["said"][0]["text"])] if last["round"] else []
    return [(title, _line(text)) for title, text in said]


def _line(text: str) -> str:
    line = visible(" ".join(text.split())) or NOTHING
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
