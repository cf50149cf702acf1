"""Small plots as inline SVG. Their colours are the page's CSS variables, so that one drawing serves light and dark.

Drawn by hand: a page with a dozen of them stays small, and nothing has to be imported to make them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 440, 250
"""Of a plot, in its own units; shown about as wide, so that its text keeps the size of the page's."""
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 42
COLOURS = 8
"""The page's --c0 to --c7."""
MARKED = 40
"""Points of a line that still get a dot each."""
ROW = 22
"""Height of a bar with its gap."""

BARS = 60
"""Clients that are drawn; of more, so many evenly from the largest to the smallest. The tables have them all."""

Bar = tuple[str, dict[str, float]]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: its points in order, gaps left out. line: False for dots alone."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


def short(value: float) -> str:
    """A number as an axis shows it."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers, or whole ones, that cover low to high, the first and last at or outside them."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # fewer digits apart than a tick can show
        spread = 1.0 if whole else abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = max((high - low) / most, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        step * power for step in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if step * power >= rough * 0.999
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Exponents of ten around low to high, both above zero."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    step = max(1, math.ceil((last - first) / most))
    return [float(first + step * number) for number in range(math.ceil((last - first) / step) + 1)]


def line_plot(
    series: Sequence[Series], *, x: str, y: str, x_format: Format = short, y_format: Format = short, log: bool = False
) -> Markup:
    """Lines over a common x axis; where log, the y axis is logarithmic and values at or below zero lie on its floor.

    x, y: what the axes show. Every point that is marked says its values when pointed at.
    """
    shown = [part for part in series if part.points]
    xs = [point[0] for part in shown for point in part.points]
    ys = [point[1] for part in shown for point in part.points]
    if not xs:
        return Markup("")
    whole = all(float(value).is_integer() for value in xs)
    x_ticks = ticks(min(xs), max(xs), 5 if x_format is short else 3, whole)
    if log:
        positive = [value for value in ys if value > 0] or [1e-16]
        y_ticks = decades(min(positive), max(positive))
    else:
        y_ticks = ticks(min(ys), max(ys))
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def across(value: float) -> float:
        return LEFT + inner[0] * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(value: float) -> float:
        level = (math.log10(value) if value > 0 else y_ticks[0]) if log else value
        return TOP + inner[1] * (1 - (level - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    out = [_open(HEIGHT, f"{y} over {x}: {', '.join(part.name for part in shown)}")]
    for tick in y_ticks:
        at = TOP + inner[1] * (1 - (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        label = f"1e{tick:.0f}" if log else y_format(tick)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{_text(label)}</text>')
    for tick in x_ticks:
        anchor = "end" if tick == x_ticks[-1] else "mid"
        at = min(across(tick), WIDTH - RIGHT + (8 if anchor == "end" else 0))
        out.append(f'<text class="{anchor}" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}">{_text(x_format(tick))}</text>')
    out.append(f'<text class="mid axis" x="{LEFT + inner[0] / 2:.0f}" y="{HEIGHT - 6}">{_text(x)}</text>')
    for number, part in enumerate(shown):
        places = [(across(a), up(b)) for a, b in part.points]
        if part.line and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            out.append(f'<polyline class="s{number % COLOURS}" points="{path}"/>')
        if len(places) <= MARKED or not part.line:
            for (a, b), (left, right) in zip(places, part.points, strict=True):
                said = f"{part.name}: {y_format(right)} at {x} {x_format(left)}"
                out.append(
                    f'<circle class="f{number % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                    f"<title>{_text(said)}</title></circle>"
                )
    return Markup("".join(out) + "</svg>") + legend([part.name for part in shown])


def bar_plot(rows: Sequence[tuple[str, Mapping[str, float]]], *, what: str, form: Format = short) -> Markup:
    """A horizontal bar a row, its parts side by side. rows: name and amounts by part. what: what the length shows."""
    parts = list(dict.fromkeys(part for _, amounts in rows for part in amounts))
    longest = max((sum(amounts.values()) for _, amounts in rows), default=0)
    if not longest:
        return Markup("")
    row = ROW if len(rows) <= 30 else 9
    names, height = 112, row * len(rows) + 22
    room = WIDTH - names - 60
    out = [_open(height, f"{what}, a bar each for {len(rows)} rows: {', '.join(parts)}")]
    for number, (name, amounts) in enumerate(rows):
        at, top = float(names), 4 + row * number
        # Where bars are thin, every third is named.
        if row == ROW or number % 3 == 0:
            short_name = name if len(name) <= 16 else f"{name[:15]}…"
            out.append(f'<text class="end" x="{names - 6}" y="{top + row * 0.5 + 2:.0f}">{_text(short_name)}</text>')
        for colour, part in enumerate(parts):
            width = room * amounts.get(part, 0) / longest
            if width > 0:
                said = f"{name}, {part}: {form(amounts[part])}"
                out.append(
                    f'<rect class="f{colour % COLOURS}" x="{at:.1f}" y="{top}" width="{max(width, 0.5):.1f}" '
                    f'height="{row - (6 if row == ROW else 2)}"><title>{_text(said)}</title></rect>'
                )
            at += width
        if row == ROW:
            out.append(f'<text x="{at + 5:.1f}" y="{top + 13}">{_text(form(sum(amounts.values())))}</text>')
    out.append(f'<text class="axis" x="{names}" y="{height - 4}">{_text(what)}</text>')
    return Markup("".join(out) + "</svg>") + (legend(parts) if len(parts) > 1 else Markup(""))


def spread(bars: Sequence[Bar]) -> list[Bar]:
    """At most BARS of them, evenly, the first and the last among them."""
    if len(bars) <= BARS:
        return list(bars)
    return [bars[round(number * (len(bars) - 1) / (BARS - 1))] for number in range(BARS)]


def spread_note(count: int) -> str:
    """What is said of so many clients where not all are drawn."""
    return f"{BARS} of {count:,} clients are drawn, evenly from the largest to the smallest." if count > BARS else ""


def legend(names: Sequence[str]) -> Markup:
    """Which colour is what; nothing for a single one, which the title names."""
    if len(names) < 2:
        return Markup("")
    keys = "".join(f'<li><i class="k{number % COLOURS}"></i>{_text(name)}</li>' for number, name in enumerate(names))
    return Markup('<ul class="legend">' + keys + "</ul>")


def _open(height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(label)}">'


def _text(text: str) -> str:
    return str(Markup.escape(text))
