"""What a person sees of a run: a header, a line a round with a progress bar under it, and a closing table.

All of it goes to standard error. Where that is no terminal there is no bar and no control character. A notebook shows
it, with the bar, as one output of its cell that is renewed in place.
"""

import html
import io
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from fedlotr.adapters.methods import METHODS
from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import shorten, visible
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.models.kinds import BESIDE, METRICS
from fedlotr.reporting.callbacks import Callbacks, FinishEvent, RoundEvent, StartEvent
from fedlotr.reporting.documents import Facts, Held, Kinds, Summary, VirtualSummary, kinds_of, under
from fedlotr.reporting.escaping import lines as plain_lines
from fedlotr.reporting.fitting import columns_of, filled, fits, show_table, wrapped
from fedlotr.reporting.samples import MARKDOWN, in_short, samples_in

SHOWN_CLIENTS = 8
"""Rows of the partition table when there are more clients than `SHOWN_CLIENTS + 4`; four rows then sum up the rest."""
SHOWN_GROUPS = 12
"""Groups of test rows that are told one by one; of more, report.html has each."""

SHOWN_LABELS = 8
"""Labels that get a column each in the partition table; of more labels only the number is shown."""

NAMED_CLIENTS = 6
"""Clients that the closing table names for each way in which some failed."""

LONGEST_CLIENT = 24
"""Characters of a client's name in the partition table."""

PLAIN_WIDTH = 100
"""Columns of tables where there is no terminal to ask, and COLUMNS does not say."""

BAR_WIDTH = 12
"""Columns of the progress bar: the line that it is in fits 80."""

NOTEBOOK_LINES = 100
"""First and last lines of a run that a notebook goes on showing."""
NOTEBOOK_WIDTH = 120
"""Columns there: a round is a line, and a cell on a small screen has room for it."""
CELL_STYLE = "white-space: pre; overflow-x: auto; font: 12px/1.2 'DejaVu Sans Mono', Menlo, 'Courier New', monospace"
"""JupyterLab gives `pre` the font of its text, in which no table holds together."""

Known = Callable[[str, str], str | None]
"""A form and the name of a fact or an option -> its value in this form; None where it has none."""

FORMS = {name: metric.form for name, metric in {**METRICS, **BESIDE}.items()}
"""How each of the metrics of our tasks is written; one of the caller's own is written as accuracy is."""


class Console(Callbacks):
    """The display of one run; with `quiet` it prints nothing, but still keeps `run_dir` and `finished_rounds`.

    `stage` says what takes a while. Used in a `with` statement, or closed by `close`, it leaves the terminal as it was.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.run_dir: Path | None = None
        self.finished_rounds = 0
        self._failed = 0
        self._rounds = 0
        self._bytes = 0
        self._metric: str | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._cell = _Cell() if stream is None and rich.console.Console().is_jupyter else None
        out = self._cell or stream or sys.stderr
        plain: dict[str, Any] = {} if self._cell is None else {"force_terminal": False, "color_system": None}
        self._out = rich.console.Console(
            file=out, quiet=quiet, highlight=False, markup=False, emoji=False, force_jupyter=False, **plain
        )
        if not self._out.is_terminal:
            self._out.width = columns_of(out, PLAIN_WIDTH if self._cell is None else NOTEBOOK_WIDTH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, run_dir: Path, finished_rounds: int = 0) -> None:
        """Note where the run is kept and how many rounds of it are there already, for whoever has to explain an end."""
        self.run_dir, self.finished_rounds = run_dir, finished_rounds

    @override
    def on_start(self, event: StartEvent) -> None:
        """Show what is about to run."""
        config, facts = event.config, event.facts
        self._rounds, self._metric = config.rounds, facts.get("metric")
        header = _header(config, facts)
        if self.run_dir is not None:
            header.append(("run", str(self.run_dir)))
        room = max(len(title) for title, _ in header)
        for title, text in header:
            lines = Text(wrapped(visible(text), self._out.width, first=f"{title:{room}}  ", indent=" " * (room + 2)))
            lines.stylize("bold", 0, len(title))
            self._out.print(lines, soft_wrap=True)
        if facts.get("partition"):
            self._show_partition(facts["partition"], kinds_of(facts))

    def stage(self, text: str) -> None:
        """Say what the run is doing now."""
        self._print(text, style="dim")

    def show(self, text: str) -> None:
        """A line that was asked for."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Say what the user must know of the run, above the progress bar."""
        self._print(f"warning: {text}", style="yellow")

    @override
    def on_round(self, event: RoundEvent) -> None:
        """Show one finished round."""
        number, record = event.round, event.metrics
        lost = sum(kind in OUTCOMES for kind in (record.get("failures") or {}).values())
        self._failed += int(record.get("failed") or 0)
        failed = int(record.get("failed") or 0) - lost
        self._bytes += int(record.get("bytes_up") or 0) + int(record.get("bytes_down") or 0)
        if self._progress is None:
            self._begin_rounds()
        self.finished_rounds = max(self.finished_rounds, number)
        width = len(str(self._rounds))
        parts = [
            f"round {number:{width}}/{self._rounds}",
            *_results(record, self._metric),
        ]
        told = record.get("clients", 0) is not None  # of hidden clients nothing is that grows with their number
        if told:
            parts.append(f"{record.get('clients', 0)} clients")
        if failed:
            parts.append(f"{failed} FAILED")
        if record.get("virtual_seconds") is not None:
            parts.append(_count(record.get("used", 0), "update") + (f", {lost} lost" if lost else ""))
        if told:
            parts += [f"{way} {readable_bytes(record.get(f'bytes_{way}') or 0)}" for way in ("up", "down")]
        if record.get("epsilon") is not None:
            parts.append(f"epsilon {record['epsilon']:.3g}")
        if record.get("aggregation_error") is not None:
            parts.append(f"aggregation error {record['aggregation_error']:.1e}")
        if record.get("virtual_seconds") is not None:
            parts.append(f"at {record['virtual_seconds']:,.6g} virtual s")
        if told:
            seconds = sum(record.get(key) or 0.0 for key in ("train_seconds", "evaluate_seconds"))
            parts.append(f"{seconds:.1f} s")
        # In a file a round is a line.
        line = filled(parts, self._out.width, indent="    ", gap="  ") if self._live else "  ".join(parts)
        self._out.print(line, soft_wrap=True)
        if self._progress is not None:
            latest = "  ".join([*_results(record, self._metric), *([readable_bytes(self._bytes)] if told else [])])
            self._progress.update(self._task, completed=self.finished_rounds, latest=latest)
            self._show_bar()

    @override
    def on_finish(self, event: FinishEvent) -> None:
        """Show the closing table: summary.json, in the words of a person."""
        self.close()
        summary = event.summary
        rows = _closing_rows(summary, summary.get("failed_clients", self._failed))
        show_table(self._out, [], rows, title="Result", right=[1], bold=[0])
        if self.run_dir is not None:
            lines = [f"run      {self.run_dir}"]  # a path stays whole
            if summary.get("baseline") != "local":  # whose clients have no model in common
                kept = summary.get("adapter_round", summary.get("rounds"))
                of = "" if kept == summary.get("rounds") else f" is that of round {kept}, the best;"
                lines += [
                    f"adapter  {self.run_dir / 'adapter'}",
                    f"        {of} (README.md there has the lines that use it)",
                ]
            if (samples := samples_in(self.run_dir)) is not None:
                lines.append(f"samples  {self.run_dir / MARKDOWN}")
                lines += [f"         {title:7}{text}" for title, text in in_short(samples)]
            self._out.print("\n".join(lines), soft_wrap=True)

    def close(self) -> None:
        """Take the progress bar off the terminal; nothing happens where there is none."""
        if self._progress is not None:
            if self._cell is None:
                self._progress.stop()
            else:
                self._cell.show_under("")
            self._progress = None

    @property
    def _live(self) -> bool:
        """Whether somebody is looking: at a terminal, or at a notebook."""
        return self._out.is_terminal or self._cell is not None

    def _begin_rounds(self) -> None:
        if not self._live or self._out.quiet:
            return
        columns = (
            TextColumn("rounds"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[latest]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        # A round may take minutes: the pace is taken over the whole run, not over rich's last thirty seconds.
        self._progress = Progress(*columns, console=self._out, speed_estimate_period=1e9, transient=True)
        self._task = self._progress.add_task("", total=self._rounds, completed=self.finished_rounds, latest="")
        if self._cell is None:
            self._progress.start()

    def _show_bar(self) -> None:
        """In a notebook, where there is no cursor to move, under the lines of the cell."""
        if self._cell is not None and self._progress is not None:
            with self._out.capture() as capture:
                self._out.print(self._progress.get_renderable())
            self._cell.show_under(capture.get().rstrip())

    def _print(self, text: str, style: str | None = None) -> None:
        text = plain_lines(text)
        shown = wrapped(text, self._out.width, indent="    ") if self._live else text
        self._out.print(shown, style=style, soft_wrap=True)

    def _show_partition(self, partition: Sequence[Held], kinds: Kinds) -> None:
        """Examples a client, and of each label, or group that rows were dealt by, where these have room."""
        kinds = kinds._replace(names=[visible(name) for name in kinds.names])
        for names in (kinds.names, []):
            if len(names) <= SHOWN_LABELS:
                head, rows, summed = _partition_rows(partition, kinds, names)
                if not names or fits([head, *rows], self._out.width):
                    break
        title = f"Examples of the {_count(len(partition), 'client')}"
        title += f" by {visible(kinds.by)}" if kinds.key == "groups" else ""
        show_table(
            self._out, head, rows, title=title, right=range(1, len(head)), sections=[SHOWN_CLIENTS] if summed else []
        )


class _Cell(io.StringIO):
    """What a notebook shows of a run, in one place of its cell: the lines so far, renewed with each, and a bar."""

    def __init__(self) -> None:
        super().__init__()
        self._lines, self._under = "", ""
        self._handle: Any = None

    def write(self, text: str) -> int:
        """More lines; they are seen after `flush`."""
        self._lines += text
        return len(text)

    def flush(self) -> None:
        """Show all."""
        from IPython.display import display

        kept = self._lines.split("\n")
        if len(kept) > 2 * NOTEBOOK_LINES:
            kept = [*kept[:NOTEBOOK_LINES], "...", *kept[-NOTEBOOK_LINES:]]
            self._lines = "\n".join(kept)
        text = self._lines + self._under
        if not text:
            return
        page = f'<pre style="{CELL_STYLE}">{html.escape(text)}</pre>'
        forms = {"text/plain": text, "text/html": page}
        if self._handle is None:
            self._handle = display(forms, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(forms, raw=True)

    def show_under(self, text: str) -> None:
        """A line under the others in place of the last such line."""
        self._under = text
        self.flush()


def readable_bytes(count: float) -> str:
    """A number of bytes with its unit, in powers of 1000: 1234567 is '1.23 MB'."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"


def readable_seconds(seconds: float) -> str:
    """Virtual seconds, in a larger unit too where there is one: 86400 is '86,400 s (1 d)'."""
    exact = f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds:.3g} s"
    unit, size = next(
        ((unit, size) for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)) if seconds >= size), ("s", 1)
    )
    return exact if size == 1 else f"{exact} ({seconds / size:.3g} {unit})"


def _exact_bytes(count: float) -> str:
    """Readable, and to the byte (a mean over rounds may have a fraction)."""
    exact = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
    return f"{exact} B" if count < 1000 else f"{readable_bytes(count)} ({exact} B)"


def _forms(own: str | None) -> dict[str, str]:
    """How each metric is written, one of the caller's own first."""
    return FORMS if own is None else {own: FORMS.get(own, FORMS["accuracy"]), **FORMS}


def _results(record: Mapping[str, Any], metric: str | None = None) -> list[str]:
    """Loss and metrics, where this round has them. metric: the decisive one."""
    loss = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
    metrics = [
        f"{name} {form.format(record[name])}" for name, form in _forms(metric).items() if record.get(name) is not None
    ]
    return loss + metrics


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _rank(config: SimulationConfig) -> str:
    """Of the run's layers, and of those that have another."""
    ranks = [f"rank {config.rank}", *(f"{r} for {pattern}" for pattern, r in config.rank_pattern.items())]
    return ", ".join(ranks) + (", capped by the layers' widths" if config.cap_rank else "")


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _header(config: SimulationConfig, facts: Facts) -> list[tuple[str, str]]:
    def known(form: str, name: str) -> str | None:
        value = under(facts, name) if name in facts else getattr(config, name, None)
        return None if value is None else form.format(value)

    return [
        (title, text) for title, text in (*_learnt(config, facts, known), *_carried_out(config, facts, known)) if text
    ]


def _learnt(config: SimulationConfig, facts: Facts, known: Known) -> list[tuple[str, str]]:
    """What is trained, on what and by what."""
    adapter, head = facts.get("trained_adapter"), facts.get("trained_head")
    trained = (adapter or 0) + (head or 0)
    share = f"{trained / facts['parameters']:.2%} of the model" if facts.get("parameters") else None
    labels = facts.get("labels")
    rows = [
        ("model", _joined(config.model, known("{:,} parameters", "parameters"))),
        (
            "data",
            _joined(
                config.data,
                known("{}", "task"),
                known("{:,} examples to train", "train_examples"),
                known("{:,} to test", "test_examples"),
                _count(len(labels), "label") if labels else None,
                known("largest class {:.1%}", "largest_class"),
                known("{}", "scale"),
            ),
        ),
        ("splits", facts.get("splits", "")),
        (
            "method",
            _joined(
                config.method,
                _rank(config) if METHODS[config.method].factored else None,
                known("basis {}", "basis"),
                known("tie {}", "tie"),
                known("strategy {}", "strategy"),
            ),
        ),
    ]
    if adapter is not None or head is not None:
        numbers = f"{_count(trained, 'number')} ({adapter or 0:,} + {head or 0:,} in the head)"
        rows.append(("trained", _joined(numbers, share)))
    if config.baseline == "central":
        pace = f"{facts.get('steps', 0):,} steps of {facts.get('batch_size', 0):,} examples a round"
        rows.append(("baseline", f"central: one model on the examples of all clients, {pace}"))
    elif config.baseline == "local":
        rows.append(("baseline", "local: each client alone; results are means over the clients"))
    if facts.get("adapted"):
        rows.append(("layers", facts["adapted"]["words"]))
    if facts.get("sequences"):
        rows.append(("sequences", facts["sequences"]))
    if facts.get("texts"):
        rows.append(("texts", facts["texts"]["words"]))
    if facts.get("attack"):
        rows.append(("hostile", facts["attack"]["words"]))
    if facts.get("privacy"):
        rows.append(("privacy", facts["privacy"]))
    if facts.get("scored_on"):
        rows.append(("scored on", facts["scored_on"]))
    if facts.get("samples"):
        rows.append(("samples", facts["samples"]))
    return rows


def _carried_out(config: SimulationConfig, facts: Facts, known: Known) -> list[tuple[str, str]]:
    """Who trains, how, and where."""
    epochs, steps = config.local_epochs, config.local_steps
    work = _count(epochs, "epoch") if epochs is not None else _count(steps or 0, "step")
    return [
        (
            "clients",
            _joined(
                f"{config.clients} pooled"
                if config.baseline == "central"
                else f"{config.asked} of {config.clients} {'at a time' if config.mode == 'async' else 'a round'}",
                _count(config.rounds, "round"),
                config.partition,
                known("at most {:,} examples each", "max_examples"),
            ),
        ),
        (
            "training",
            _joined(
                f"{work} of batches of {config.batch_size}",
                config.optimizer,
                known("rate {:g}", "lr") if facts.get("trained_adapter") != 0 else None,
                known("rate of the head {:g}", "head_lr") if facts.get("trained_head") != 0 else None,
            ),
        ),
        *_wire(config),
        ("links", facts.get("chain", "")),
        ("virtual time", facts.get("virtual_time", "")),
        ("fleet", facts.get("fleet", "")),
        (
            "engine",
            _joined(
                config.engine,
                known("workers {}", "workers"),
                known("threads {}", "threads"),
                known("cohort {}", "cohort"),
                config.device if config.device != "cpu" else None,
                config.dtype,
                f"linear layers in {config.quantize}" if config.quantize != "none" else None,
            ),
        ),
    ]


def _wire(config: SimulationConfig) -> list[tuple[str, str]]:
    """What is special about the way that messages travel, if anything is."""
    coding = config.coding
    parts = [f"{coding.codec} up, {coding.broadcast_codec} down"] if coding.at_work else []
    parts += ["error feedback"] if coding.feedback else []
    parts += [f"simulated on {config.link}"] if config.link is not None and not config.virtual else []
    return [("messages", ", ".join(parts))] if parts else []


def _partition_rows(
    partition: Sequence[Held], kinds: Kinds, names: Sequence[str]
) -> tuple[list[str], list[list[str]], bool]:
    """Head and rows, and whether they are summed up: many clients are cut to the first few and the spread of all.

    names: labels or groups that have a column each; where there are none, their number has one.
    """
    head = ["client", "examples", *(names or ([kinds.key] if kinds.names else []))]
    rows = []
    for client in partition:
        counts = {visible(label): count for label, count in client.get(kinds.key, {}).items()}
        details = [counts.get(name, 0) for name in names] if names else [len(counts)] if kinds.names else []
        rows.append((_cut(str(client["client"])), [int(client["examples"]), *details]))
    summed = len(rows) > SHOWN_CLIENTS + 4
    shown = [[name, *(f"{number:,}" for number in numbers)] for name, numbers in rows]
    if summed:
        shown[SHOWN_CLIENTS:] = [[f"{len(rows) - SHOWN_CLIENTS} more", *("..." for _ in head[1:])]]
        every = list(zip(*(numbers for _, numbers in rows), strict=True))
        for title, spread in (("least", min), ("median", statistics.median), ("most", max)):
            shown.append([title, *(f"{spread(column):,g}" for column in every)])
    return head, shown, summed


def _cut(name: str) -> str:
    """A client's name, which may be long; it is often the end that tells one from another."""
    half, name = LONGEST_CLIENT // 2, visible(name)
    return name if len(name) <= LONGEST_CLIENT else f"{name[: half - 1]}…{name[-half:]}"


def _named(clients: Mapping[str, int]) -> str:
    """'client 7', 'clients 3, 12 (4 rounds) and 5 more'."""
    names = [name if rounds == 1 else f"{name} ({rounds} rounds)" for name, rounds in clients.items()]
    more = f" and {len(names) - NAMED_CLIENTS:,} more" if len(names) > NAMED_CLIENTS else ""
    return f"client{'' if len(names) == 1 else 's'} {', '.join(names[:NAMED_CLIENTS])}{more}"


def _undefined(summary: Summary) -> str:
    reason = summary.get("aggregation_error_reason")
    return f"not defined: {reason}" if reason else "not defined"


def _result_rows(summary: Summary) -> list[tuple[str, str]]:
    """What a run came to."""
    final, best = summary.get("final") or {}, summary.get("best") or {}
    rows: list[tuple[str, str]] = []
    for name, form in _forms(summary.get("metric")).items():
        if final.get(name) is not None:
            error = (summary.get("standard_errors") or {}).get(name)
            beside = "" if error is None else f" ± {form.format(error)}"
            rows.append((f"{name}, final", f"{form.format(final[name])}{beside}"))
        if best.get(name) is not None:
            rows.append((f"{name}, best", f"{form.format(best[name])} (round {best['round']})"))
    rows += _by_group(summary)
    if final.get("loss") is not None:
        rows.append(("loss, final", f"{final['loss']:.4f}"))
        if losses := summary.get("losses"):
            rows.append(("", losses["loss"].partition(": ")[2]))
    if (promise := summary.get("privacy")) is not None:
        spent = promise["epsilon_reason"] or f"{promise['epsilon']:.3g} at delta {promise['delta']:.2g}"
        rows.append((f"epsilon, one {promise['unit']}", spent))
    for name, form in FORMS.items():
        if f"{name}_std" in (spread := summary.get("over_clients") or {}):
            rows.append((f"{name}, deviation of the clients", form.format(spread[f"{name}_std"])))
            rows.append((f"{name}, worst tenth of them", form.format(spread[f"{name}_worst_tenth"])))
    if (own := summary.get("client_evaluation")) is not None:
        form = FORMS[own["metric"]]
        rows.append(
            (
                f"{own['metric']} of {own['clients']} clients",
                f"{form.format(own['mean'])} ± {form.format(own['spread'])}",
            )
        )
        rows.append(("  of their worst tenth", form.format(own["worst_tenth"])))
        if (gain := own.get("gain")) is not None:
            text = f"{form.format(gain['mean'])}, worst tenth {form.format(gain['worst_tenth'])}, {gain['worse']} lose"
            rows.append(("  gain over the start", text))
    return rows


def _by_group(summary: Summary) -> list[tuple[str, str]]:
    """The metrics of each group of test rows, with their standard errors, of few groups; and their spread over all."""
    found, groups = [], summary.get("score_by") or {}
    for group, scored in groups.items() if len(groups) <= SHOWN_GROUPS else ():
        each: Mapping[str, Any] = scored
        told = []
        for name in each["standard_errors"]:
            form = FORMS.get(name, FORMS["accuracy"])
            error = each["standard_errors"][name]
            value = "none" if each[name] is None else form.format(each[name])
            told.append(f"{name} {value}" + ("" if error is None else f" ± {form.format(error)}"))
        found.append((f"  {shorten(group)}, {_count(each['rows'], 'row')}", ", ".join(told)))
    for name, over in (summary.get("over_groups") or {}).items():
        mean, spread, worst = map(FORMS[name].format, (over["mean"], over["spread"], over["worst_tenth"]))
        found.append((f"{name} over {_count(over['groups'], 'group')}", f"{mean} ± {spread}, worst tenth {worst}"))
    return found


def _times(clients: Mapping[str, int]) -> int:
    """How often, of clients and the rounds in which it was."""
    return sum(clients.values())


def _in_virtual_time(virtual: VirtualSummary, lost: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    """What became of time and messages. lost: why -> client -> in how many rounds."""
    rows = [
        ("virtual seconds", readable_seconds(virtual["seconds_total"])),
        ("  a round, median", readable_seconds(virtual["seconds_per_round_median"])),
        ("  until the best round", readable_seconds(virtual["seconds_to_best"])),
        ("updates used", f"{virtual['used']:,}"),
    ]
    if (stale := virtual["staleness_mean"]) is not None:
        rows.append(("  their mean staleness", f"{stale:.3g} rounds"))
    rows.append(("updates lost", f"{sum(map(_times, lost.values())):,}"))
    rows += [
        (f"  {kind}", f"{_times(clients):,} of {_count(len(clients), 'client')}") for kind, clients in lost.items()
    ]
    rows.append(("bytes in vain", _exact_bytes(virtual["bytes_in_vain"])))
    if virtual["under_way"]:
        rows.append(("still under way", _count(virtual["under_way"], "message")))
    return rows


def _closing_rows(summary: Summary, failed: int | None) -> list[tuple[str, str]]:
    """What a run came to, and what it took."""
    traffic, timing = summary.get("communication") or {}, summary.get("timing") or {}
    rows = _result_rows(summary)
    for title, key in (
        ("upload a client and round", "upload_payload_bytes_per_client_round"),
        ("download a client and round", "download_payload_bytes_per_client_round"),
        ("one-off download a client", "one_off_bytes_per_client"),
        ("all payload", "total_payload_bytes"),
        ("all bytes on the wire", "total_wire_bytes"),
    ):
        if (count := under(traffic, key)) is not None:
            rows.append((title, _exact_bytes(count)))
    error = summary.get("aggregation_error_max")
    rows.append(("largest aggregation error", _undefined(summary) if error is None else f"{error:.1e}"))
    if (coded := summary.get("codec")) is not None:
        rows.append(("codec, up", coded["update"] + (" with feedback" if coded["error_feedback"] else "")))
        rows.append(("codec, down", coded["broadcast"]))
        rows += [
            (title, f"{lost:.1e}")
            for title, key in (
                ("transport error, median", "transport_error_median"),
                ("broadcast error, median", "broadcast_error_median"),
            )
            if (lost := under(coded, key)) is not None
        ]
    failures = summary.get("failures") or {}
    lost = {kind: clients for kind, clients in failures.items() if kind in OUTCOMES}
    if failed is not None:
        rows.append(("failed clients", f"{failed - sum(_times(clients) for clients in lost.values()):,}"))
    rows += [(f"  {kind}", _named(clients)) for kind, clients in failures.items() if kind not in OUTCOMES]
    if (virtual := summary.get("virtual")) is not None:
        rows += _in_virtual_time(virtual, lost)
    if (reckoned := summary.get("simulated")) is not None:
        each, half = reckoned["seconds_per_round_median"], reckoned["median_client_seconds_median"]
        rows.append((f"simulated: sending on {reckoned['link']}", f"{reckoned['seconds_total']:.3g} s"))
        rows.append(("  a round; its median client", f"{each:.3g} s; {half:.3g} s"))
    if timing.get("seconds_total") is not None:
        rows.append(("seconds", f"{timing['seconds_total']:.1f}"))
    if timing.get("base_model_loads") is not None:
        workers = f" by the server and {_count(timing['workers'], 'worker')}" if timing.get("workers") else ""
        rows.append(("loads of the frozen model", f"{timing['base_model_loads']}{workers}"))
    return rows
