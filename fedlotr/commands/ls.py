"""`fedlotr ls methods`, `strategies`, `fleets` and so on: what there is to choose from, its costs, and a template."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path

from fedlotr.adapters.methods import METHODS, Method
from fedlotr.communication.attacks import ATTACKS, AttackKind
from fedlotr.config.partitions import PARTITIONS
from fedlotr.cost.formulas import PAIR, SEED_AND_HASH, in_words
from fedlotr.errors import nearest
from fedlotr.fleet.devices import DEVICES
from fedlotr.fleet.faults import FAULTS
from fedlotr.fleet.modes import MODES
from fedlotr.fleet.presets import FLEETS
from fedlotr.fleet.sampling import SAMPLINGS
from fedlotr.models.kinds import TASK_KINDS

TEMPLATE = Path(__file__).parents[1] / "flower" / "template.py"
"""A strategy to copy, with a word on each of its methods."""

Row = dict[str, str]


def one_off(row: Method) -> str:
    """What a client receives once: the frozen factors, a seed and a hash, or nothing."""
    if not row.freezes:
        return "nothing"
    if row.basis_kind().derivable:
        return f"seed and hash, {SEED_AND_HASH} bytes"
    return f"{PAIR.text} {'per type' if row.tie == 'type' else 'per layer'}"


def methods() -> list[Row]:
    """One row a method."""
    return [
        {
            "method": name,
            "trains": ", then ".join(", ".join(turn) for turn in row.turns or (row.train,)) or "the head",
            "basis": row.basis if row.factored else "",
            "tie": row.tie if row.factored else "",
            "core": row.core if row.factored else "",
            "upload a layer": in_words(row),
            "one-off": one_off(row),
            "strategy": row.strategy,
            "paper": row.paper,
        }
        for name, row in METHODS.items()
    ]


def strategies() -> list[Row]:
    """One row a strategy that an installed package announces; one that cannot be loaded says why."""
    from fedlotr.flower.traits import traits_of

    found = []
    for point in sorted(entry_points(group="fedlotr.strategies"), key=lambda point: point.name):
        try:
            with redirect_stdout(sys.stderr):  # what its import prints is no part of the list
                kind = point.load()
            certified = "yes" if traits_of(kind).averages else "no"
            about = (kind.__doc__ or "").strip().splitlines()
        except (Exception, SystemExit) as error:  # a package of someone else's, which may also end the program
            certified, about = "?", [f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"]
        found.append(
            {"strategy": point.name, "certified": certified, "what": about[0] if about else "", "from": point.value}
        )
    return found


def formats() -> list[Row]:
    """One row a form of rows, in the order in which they are recognised, and those that installed packages announce."""
    from fedlotr.data.formats import FORMATS
    from fedlotr.data.own_format import GROUP

    ours = [
        {"format": name, "for": _task(entry.labelled, entry.scale), "what": entry.text}
        for name, entry in FORMATS.items()
    ]
    others = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return [*ours, *({"format": point.name, "for": _task(), "what": point.value} for point in others)]


def metrics() -> list[Row]:
    """One row a metric that `--score` may name; the first of each task is computed in any case."""
    return [
        {"metric": name, "for": task, "better": "higher" if metric.higher_is_better else "lower", "what": metric.text}
        for task, kind in TASK_KINDS.items()
        for name, metric in kind.scores.items()
    ]


def _task(labelled: bool = False, scale: bool = False) -> str:
    return next(name for name, kind in TASK_KINDS.items() if (kind.headed, kind.scale) == (labelled, scale))


def fleets() -> list[Row]:
    """One row a fleet that `--fleet` takes by its name, in the words that a file of one's own would have."""
    return [
        {"fleet": name, "what": words.in_words(), "source": "an assumption of ours, not figures of any fleet"}
        for name, words in FLEETS.items()
    ]


def devices() -> list[Row]:
    """One row a device that a fleet may name."""
    return [
        {"device": name, "what": f"{device.flops:.3g} operations a second at training", "source": device.source}
        for name, device in DEVICES.items()
    ]


def faults() -> list[Row]:
    """One row a fault on purpose."""
    return [{"fault": name, "what": fault.text} for name, fault in FAULTS.items()]


def attacks() -> list[Row]:
    """One row a thing that hostile clients do; of those that take a number, with its default."""
    return [
        {"attack": f"{name}=X" if kind.takes else name, "what": kind.text, "X": _number(kind)}
        for name, kind in ATTACKS.items()
    ]


def _number(kind: AttackKind) -> str:
    return f"{kind.takes} (default: {kind.usual:g})" if kind.takes else ""


def modes() -> list[Row]:
    """One row a mode of rounds in virtual time."""
    return [{"mode": name, "a round waits": mode.text} for name, mode in MODES.items()]


def samplings() -> list[Row]:
    """One row a rule by which a round draws its clients."""
    return [{"sampling": rule.form, "asks": rule.text} for rule in SAMPLINGS.values()]


def partitions() -> list[Row]:
    """One row a rule by which rows are dealt to clients."""
    return [{"partition": form.form, "what": form.text} for form in PARTITIONS.values()]


KINDS = {
    "methods": methods,
    "strategies": strategies,
    "formats": formats,
    "metrics": metrics,
    "fleets": fleets,
    "devices": devices,
    "modes": modes,
    "samplings": samplings,
    "partitions": partitions,
    "faults": faults,
    "attacks": attacks,
}
USAGE = f"usage: fedlotr ls {'|'.join(KINDS)} [--json], or: fedlotr ls strategies --template"


def main(argv: Sequence[str]) -> int:
    """Print a table (for the eye, tab-separated where it is piped, or as JSON) or the template; exit code 0, or 2."""
    if list(argv) == ["strategies", "--template"]:
        print(TEMPLATE.read_text(encoding="utf-8"), end="")
        return 0
    words = [word for word in argv if word != "--json"]
    if "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    if len(words) != 1 or words[0] not in KINDS:
        known = nearest(words[0], KINDS) if words else ""
        said = f"{words[0]}: nothing of that name to list{known}" if words else "nothing is named to list"
        print(f"error: {said}; {USAGE}", file=sys.stderr)
        return 2
    rows = KINDS[words[0]]()
    if "--json" in argv:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        from fedlotr.reporting.fitting import show_table

        show_table(Console(highlight=False, markup=False), list(rows[0]), [list(row.values()) for row in rows])
    else:
        print("\n".join("\t".join(cells) for cells in (list(rows[0]), *(row.values() for row in rows))))
    return 0
