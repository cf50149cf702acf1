"""What one client sends and receives in a round of 5, 50 and 500 clients, by the formulas of `fedlotr cost`.

    python experiments/clients.py --model mistral-7b --out experiments/clients.svg

draws it and prints the numbers. Nothing is trained, and no weights are read.
"""

import argparse
import math
from pathlib import Path

from fedlotr.cost.architectures import read_architecture
from fedlotr.cost.billing import bills
from fedlotr.errors import script
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.svg import HEIGHT, WIDTH, Series, line_plot

CLIENTS = (5, 50, 500)
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
SHOWN = (
    ("fed-sb", "exact-average", "up"),
    ("lora", "fedit", "up"),
    ("lora", "flora", "down"),
    ("lora", "fedex-lora", "down"),
)
"""What is drawn. fed-sb and FedIT receive what they send; FLoRA and FedEx-LoRA send what FedIT does."""


def bytes_of(model: str, ranks: tuple[int, int]) -> dict[tuple[str, str, str], list[float]]:
    """Of one client and round, the second, by number of clients; every strategy of both methods.

    ranks: of cores, and of LoRA's factors.
    """
    architecture = read_architecture(model, None, 2, "all-linear")
    found: dict[tuple[str, str, str], list[float]] = {}
    for clients in CLIENTS:
        rows, _ = bills(architecture, ["fed-sb", "lora"], ranks, clients, 2)
        for row in rows:
            for strategy in row.strategies:
                for direction, amount in (("up", row.bill.round_up), ("down", row.bill.round_down)):
                    found.setdefault((row.method, strategy, direction), []).append(amount)
    return found


def drawing(found: dict[tuple[str, str, str], list[float]]) -> str:
    """The plot as a file of its own: with colours, on white, and a legend below it."""
    names = [f"{method}, {strategy}: {direction}" for method, strategy, direction in SHOWN]
    series = [
        Series(name, [(math.log10(c / CLIENTS[0]), y) for c, y in zip(CLIENTS, found[key], strict=True)])
        for name, key in zip(names, SHOWN, strict=True)
    ]
    plot = str(
        line_plot(
            series,
            x="clients",
            y="bytes of one client and round",
            x_format=lambda power: f"{CLIENTS[0] * 10**power:.0f}",
            y_format=readable_bytes,
            log=True,
        )
    )
    opened, _, rest = plot.partition("</svg>")[0].partition(">")
    height = HEIGHT + 18 * len(names) + 6
    opened = opened.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}"')
    style = "text{font:11px sans-serif;fill:#24292f}.end{text-anchor:end}.mid{text-anchor:middle}"
    style += "polyline{fill:none;stroke-width:2}.grid{stroke:#d0d7de;stroke-width:.5}"
    style += "".join(f".s{at}{{stroke:{colour}}}.f{at}{{fill:{colour}}}" for at, colour in enumerate(COLOURS))
    keys = "".join(
        f'<circle class="f{at}" cx="70" cy="{HEIGHT + 10 + 18 * at}" r="4"/>'
        f'<text x="80" y="{HEIGHT + 14 + 18 * at}">{name} ({_ends(found[key])})</text>'
        for at, (name, key) in enumerate(zip(names, SHOWN, strict=True))
    )
    title = '<text x="70" y="9">bytes of one client and round</text>'
    svg = opened.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'{svg}><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{rest}{title}{keys}</svg>\n'


def _ends(amounts: list[float]) -> str:
    first, last = readable_bytes(amounts[0]), readable_bytes(amounts[-1])
    return f"always {first}" if amounts[0] == amounts[-1] else f"{first} to {last}"


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="mistral-7b")
    options.add_argument("--rank", type=int, default=200, help="of cores")
    options.add_argument("--lora-rank", type=int, default=32)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = options.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = bytes_of(given.model, (given.rank, given.lora_rank))
    print(f"{'bytes of one client and round':40}" + "".join(f"{clients:>18,}" for clients in CLIENTS))
    for key in SHOWN:
        print(f"{', '.join(key):40}" + "".join(f"{amount:>18,.0f}" for amount in found[key]))
    given.out.write_text(drawing(found), encoding="utf-8")
    print(f"drawn: {given.out}")


if __name__ == "__main__":
    script(main)
