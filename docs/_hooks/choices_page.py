"""The page of all tables of names besides methods and strategies: bases, cores, codecs, partitions, fleets ..."""

import sys
from collections.abc import Iterable, Sequence

from docs_text import GENERATED, code, markdown, paragraphs, table

from fedlotr.adapters.kinds import BASES, CORES, TIES
from fedlotr.adapters.moves import MOVES
from fedlotr.communication.attacks import ATTACKS
from fedlotr.communication.links import PROFILES
from fedlotr.config.partitions import PARTITIONS
from fedlotr.cost.formulas import CHECKSUM, CODED
from fedlotr.data.formats import FORMATS
from fedlotr.fleet.devices import DEVICES
from fedlotr.fleet.faults import FAULTS
from fedlotr.fleet.kinds import AVAILABILITY
from fedlotr.fleet.modes import DEFAULT_STALENESS, MODES, OUTCOMES, STALENESS
from fedlotr.fleet.presets import FLEETS
from fedlotr.fleet.sampling import SAMPLINGS
from fedlotr.flower.chain import LINKS
from fedlotr.models.kinds import TASK_KINDS

_OPENING = """# Choices

Every table of names that options choose from, besides [methods](methods.md) and [strategies](strategies.md). Each is a
table in the code, which says all there is to say of an entry to whoever asks: the command line, the refusals, the bill
and this page.
"""


def choices_page() -> str:
    """As Markdown."""
    parts = [GENERATED, _OPENING]
    for title, anchor, text, heads, rows in _sections():
        parts += [f"## {title} {{ #{anchor} }}\n", f"{markdown(text)}\n", table(heads, rows), ""]
    return "\n".join(parts)


Section = tuple[str, str, str, Sequence[str], Iterable[Sequence[str]]]


def _sections() -> Iterable[Section]:
    yield (
        "Bases",
        "bases",
        "Where the factors B and A come from (--basis). Of a seed or of the weights every client makes them by itself, "
        "and is sent 40 bytes: a seed and a hash. Of a gradient they are sent, each vector in a few bits "
        "(--basis-codec), or derived from public rows (--derive-bases).",
        ["name", "what it is", "made of", "sent"],
        ([code(n), markdown(b.text), b.made_of, "no" if b.derivable else "once"] for n, b in BASES.items()),
    )
    yield (
        "Ties", "ties", "Who shares a pair of factors (--tie).", ["name", "what it is"],
        ([code(name), markdown(text)] for name, text in TIES.items()),
    )  # fmt: skip
    yield (
        "Cores", "cores", "What stands between them (--core), and how many numbers of a layer that is.",
        ["name", "what it is", "numbers", "source"],
        ([code(n), markdown(c.text), c.numbers, c.source] for n, c in CORES.items()),
    )  # fmt: skip
    yield (
        "Ways for bases to move", "moves",
        "What --rebase T:HOW may say. All but the first cost no byte beside the core that is folded.",
        ["name", "the next pair of factors"], ([code(name), markdown(move.text)] for name, move in MOVES.items()),
    )  # fmt: skip
    yield (
        "Codecs", "codecs",
        f"How tensors travel: --codec up, --broadcast-codec down, --basis-codec for frozen factors. n: numbers of a "
        f"tensor; k: those that top-k sends. A message has {CHECKSUM} bytes of checksum besides, and `+zstd` sends at "
        "most as much.",
        ["name", "bytes of a tensor", "source"],
        ([code(name), coded.text, markdown(coded.source)] for name, coded in CODED.items()),
    )  # fmt: skip
    yield (
        "Partitions", "partitions", "How rows are dealt to clients (--partition).", ["form", "what it does", "example"],
        ([code(p.form), markdown(p.text), code(p.example)] for p in PARTITIONS.values()),
    )  # fmt: skip
    yield (
        "Formats", "formats",
        "How rows are read (--format); seen from the columns where it is not said, in this order.",
        ["name", "rows"], ([code(name), markdown(form.text)] for name, form in FORMATS.items()),
    )  # fmt: skip
    yield (
        "Tasks and metrics",
        "metrics",
        "What a model is trained for (--task), and what it may be scored by (--score). The first metric of a task is "
        "computed in any case.",
        ["task", "metric", "what it is", "better"],
        (
            [code(task), code(name), markdown(metric.text), "higher" if metric.higher_is_better else "lower"]
            for task, kind in TASK_KINDS.items()
            for name, metric in kind.scores.items()
        ),
    )
    yield (
        "Network links", "network-links",
        "How long messages take (--link), by reckoning. Round figures of ours, typical rather than measured; "
        "`up=RATE,down=RATE[,latency=TIME][,server=RATE]` writes one out.",
        ["name", "up", "down", "latency"],
        (
            [code(name), f"{link.up / 1e6:g} Mbit/s", f"{link.down / 1e6:g} Mbit/s", f"{link.latency * 1e3:g} ms"]
            for name, link in PROFILES.items()
        ),
    )  # fmt: skip
    yield (
        "Samplings", "samplings", "Whom a round asks (--sampling).", ["form", "who"],
        ([code(rule.form), markdown(rule.text)] for rule in SAMPLINGS.values()),
    )  # fmt: skip
    yield (
        "Modes", "modes", "What a round waits for, in virtual time (--mode).", ["name", "waits"],
        ([code(name), markdown(mode.text)] for name, mode in MODES.items()),
    )  # fmt: skip
    yield (
        "What late updates count", "staleness",
        f"--staleness, of updates that are so many server steps old; {DEFAULT_STALENESS} where nothing is said.",
        ["name", "counts"], ([code(name), markdown(one.text)] for name, one in STALENESS.items()),
    )  # fmt: skip
    yield (
        "Outcomes", "outcomes", "What arrivals.jsonl says of a message to a client, besides failures.",
        ["outcome", "its update"], ([code(name), markdown(text)] for name, text in OUTCOMES.items()),
    )  # fmt: skip
    yield (
        "Fleets", "fleets", "--fleet by name; shares, chances and hours are assumptions, not figures of any fleet.",
        ["name", "what a file would say"], ([code(n), markdown(f.in_words())] for n, f in FLEETS.items()),
    )  # fmt: skip
    yield (
        "Devices", "devices", "That a fleet may name, and how many operations a second each does at training.",
        ["name", "operations a second", "source"],
        ([code(name), f"{device.flops:.3g}", markdown(device.source)] for name, device in DEVICES.items()),
    )  # fmt: skip
    yield (
        "Availability", "availability", "When clients of a fleet are there.", ["form", "what it is", "example"],
        ([code(kind.form), markdown(kind.text), code(kind.example)] for kind in AVAILABILITY.values()),
    )  # fmt: skip
    yield (
        "Faults", "faults", "--fault KIND:SHARE, each with the chance of a client that is asked to meet with it.",
        ["kind", "what happens"], ([code(name), markdown(fault.text)] for name, fault in FAULTS.items()),
    )  # fmt: skip
    yield (
        "Attacks", "attacks",
        "--attack KIND:SHARE of all clients; KIND+KIND joins one of data and one of updates.",
        ["kind", "of", "what a hostile client does"],
        (
            [code(f"{name}[={kind.usual:g}]" if kind.takes else name), kind.side, markdown(kind.text)]
            for name, kind in ATTACKS.items()
        ),
    )  # fmt: skip
    yield (
        "The chain of links", "links",
        "What happens to an update on its way, in the order in which the server goes through it before it sends. "
        "--add-link puts one of yours before one of these.",
        ["name", "what it does"],
        ([code(link.name), markdown(paragraphs(sys.modules[link.__module__].__doc__)[0])] for link in LINKS),
    )  # fmt: skip
