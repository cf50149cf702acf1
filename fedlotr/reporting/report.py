"""report.html: what a run did and what it cost, on one page that opens offline. Made from the run directory alone."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import read_rebase
from fedlotr.communication.wire_form import coding_in
from fedlotr.cost.billing import Row, bills
from fedlotr.errors import InputError
from fedlotr.files import write_atomically
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.flower.plugins import built_in
from fedlotr.models.kinds import BESIDE, METRICS, TASK_KINDS
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.documents import kinds_of, under
from fedlotr.reporting.gains import of_clients
from fedlotr.reporting.hints import what_to_try
from fedlotr.reporting.page import Figure, Section, Table, render
from fedlotr.reporting.run_record import RunRecord, Traffic, number, points, read_run
from fedlotr.reporting.samples import TITLE, about, answers, name, question
from fedlotr.reporting.spent import where_it_went
from fedlotr.reporting.svg import COLOURS, Series, bar_plot, line_plot, spread, spread_note
from fedlotr.reporting.virtual import in_virtual_time

LABEL_COLUMNS = 24
"""Labels that get a column each in the table of clients; of more, a cell tells the four most frequent."""

CARRYING = ("flora", "fedex-lora")
"""Strategies over LoRA that merge, and so have a bill of their own."""

NOT_LISTED = ("partition", "labels", "groups", "versions", "shapes", "losses")
"""Facts that have tables of their own, or are none for the eye."""
BILL = "The bill under other methods"
NOT_TOLD = "Not told: it would tell which clients took part, and they are hidden."


def write_report(folder: Path, out: Path | None = None, tell: Callable[[str], None] = lambda note: None) -> Path:
    """Write the report of a run directory, into it by default; where it lies. Raises InputError for no run.

    tell: is told what had to be left out.
    """
    path = folder / "report.html" if out is None else out
    run = read_run(folder)
    write_atomically(path, report_page(run))
    for note in notes_of(run):
        tell(note)
    return path


def report_page(run: RunRecord) -> str:
    """The page, as HTML."""
    warning = ""
    if not run.finished:
        warning = f"This run is not finished: {len(run.rows)} of {run.config.get('rounds')} rounds are here."
    warning = " ".join(filter(None, [warning, *notes_of(run)]))
    traffic = run.traffic()
    sections = [
        _outcome(run),
        learning(run),
        *in_virtual_time(run, traffic),
        *_scores(run),
        *of_clients(run),
        *_samples(run),
        *where_it_went(run, traffic),
        _communication(run, traffic),
        *_bill(run),
        *([] if run.baseline else [_certificate(run)]),
        *_privacy(run),
        _clients(run),
        failed(run),
        _time(run),
        _setup(run),
        _again(run),
        what_to_try(run, traffic),
    ]
    return render(run.name, in_a_line(run), sections, warning=warning)


def in_a_line(run: RunRecord) -> str:
    """What is run."""
    config = run.config
    by = f"{run.baseline} baseline" if run.baseline else f"by {config.get('strategy')}"
    return f"{config.get('method')} {by}, {config.get('model')} on {config.get('data')}, seed {config.get('seed')}"


def notes_of(run: RunRecord) -> list[str]:
    """What is not as it should be in the files that a page is made of."""
    return [*run.notes, *(run.arrivals.notes if run.arrivals is not None else ())]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as one list of dotted names and values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if value is None or isinstance(value, int | float | str) else str(value)


def _outcome(run: RunRecord) -> Section:
    rows: list[tuple[str, Any]] = []
    for title, row in (("last", run.last), ("best", run.best)):
        if row is not None and run.metric is not None:
            rows.append((f"{run.metric}, {title} (round {row['round']})", under(row, run.metric)))
    if run.last is not None:
        of = f"last (round {run.last['round']})"
        beside = {name: under(run.last, name) for name in (*METRICS, *BESIDE) if name != run.metric}
        rows += [(f"{name}, {of}", value) for name, value in beside.items() if value is not None]
        rows.append((f"loss, as tested, {of}", run.last.get("loss")))
    if not run.hides_clients:
        rows.append(("bytes on the wire, all rounds", run.bytes_so_far[-1] if run.rows else 0))
    if run.summary:
        about = run.summary
        rows += [(key.replace("_", " "), value) for key, value in about.get("communication", {}).items()]
        rows.append(("largest aggregation error", about.get("aggregation_error_max")))
        rows.append(("seconds in all", about.get("timing", {}).get("seconds_total")))
    if not run.hides_clients:
        if hostile := run.facts.get("attack"):
            rows.append(("hostile clients", hostile["words"]))
        lost = sum(len(rounds) for clients in run.lost().values() for rounds in clients.values())
        rows.append(("failed clients", sum(row.get("failed") or 0 for row in run.rows) - lost))
        rows += [("updates lost in virtual time", lost)] if run.virtual else []
    figures = [Figure("outcome", "In numbers", table=Table(["what", "value"], rows), open=True, wide=True)]
    if said := run.summary.get("warnings"):
        figures.append(
            Figure("warnings", "What the run warned of", table=Table(["warning"], [[w] for w in said]), open=True)
        )
    return Section("Result", figures)


def learning(run: RunRecord) -> Section:
    """Metric and losses over rounds, and over bytes where these are told."""
    metric = run.metric
    across = [float(value) for value in run.bytes_so_far]
    loss = [Series("loss, as tested", points(run.rows, "loss"))]
    loss += [Series("train_loss, of the clients as they train", points(run.rows, "train_loss"))]
    columns = ["round", "loss", "train_loss", *([metric] if metric else [])]
    columns += [] if run.hides_clients else ["clients", "failed"]
    every = [[row.get(key) for key in columns] for row in run.rows]
    figures = []
    if metric is not None:
        start = number(under(run.summary.get("initial", {}), metric))
        begun = [] if start is None else [(0.0, float(start))]
        over_bytes = [Series(metric, begun + points(run.rows, metric, across))]
        figures += [
            Figure(
                "metric",
                f"{metric} over rounds",
                _lines([Series(metric, begun + points(run.rows, metric))], metric),
                Table(["round", metric], [[0, start]] * bool(begun) + [[r["round"], r.get(metric)] for r in run.rows]),
            ),
            Figure(
                "metric-bytes",
                f"{metric} over bytes",
                line_plot(over_bytes, x="bytes on the wire, both ways", y=metric, x_format=readable_bytes),
                _over_bytes(run, metric),
            ),
        ]
    figures += [
        Figure("loss", "Loss over rounds", _lines(loss, "loss"), Table(columns, every)),
        Figure(
            "loss-bytes",
            "Loss over bytes",
            line_plot(
                [
                    Series(part.name, points(run.rows, key, across))
                    for part, key in zip(loss, columns[1:3], strict=True)
                ],
                x="bytes on the wire, both ways",
                y="loss",
                x_format=readable_bytes,
            ),
            _over_bytes(run, "loss", "train_loss"),
        ),
    ]
    if not run.tells_bytes:  # nothing to draw over
        figures = [figure for figure in figures if not figure.name.endswith("-bytes")]
    losses = run.facts.get("losses") or {}
    unit = TASK_KINDS[task].unit if (task := run.facts.get("task")) in TASK_KINDS else "nats"
    text = " ".join(f"{key}, in {unit}, is {words}." for key, words in losses.items())
    return Section("Learning", figures, text)


def _scores(run: RunRecord) -> list[Section]:
    """The metrics of `--score` with their standard errors, in all and of each group; nothing of a run without them."""
    last: Mapping[str, Any] = run.last or {}
    begun: Mapping[str, Any] = run.summary.get("initial") or {}
    names = list(last.get("standard_errors") or ())
    if not names:
        return []
    groups = [("all rows", begun, last)]
    before = begun.get("score_by") or {}
    groups += [(name, before.get(name) or {}, group) for name, group in (last.get("score_by") or {}).items()]
    rows = [
        [
            of,
            first.get("rows", after.get("rows")),
            name,
            first.get(name),
            after.get(name),
            after["standard_errors"][name],
        ]
        for of, first, after in groups
        for name in names
    ]
    columns = ["of", "rows", "metric", "before the first round", f"after round {last['round']}", "standard error"]
    figure = Figure("scores", "Metrics of the test rows", table=Table(columns, rows), open=True, wide=True)
    forms, spreads = {name: metric.form.format for name, metric in METRICS.items()}, last.get("over_groups") or {}
    text = " ".join(
        f"{name} over {over['groups']} groups, each of which counts the same: mean {forms[name](over['mean'])}, "
        f"standard deviation {forms[name](over['spread'])}, worst tenth {forms[name](over['worst_tenth'])}."
        for name, over in spreads.items()
    )
    return [Section("Scores", [figure], text)]


def _samples(run: RunRecord) -> list[Section]:
    """What a language model says; nothing of a run that has asked nothing."""
    if run.samples is None:
        return []
    figures = [
        Figure(
            f"sample-{at}",
            name(run.samples, at),
            texts=question(run.samples, at),
            beside=answers(run.samples, at),
            wide=True,
        )
        for at in range(len(run.samples["prompts"]))
    ]
    return [Section(TITLE, figures, " ".join([about(run.samples), *run.samples["notes"]]))]


def _over_bytes(run: RunRecord, *keys: str) -> Table:
    rows = zip(run.rows, run.bytes_so_far, strict=True)
    return Table(["round", "bytes so far", *keys], [[row["round"], total, *map(row.get, keys)] for row, total in rows])


def _lines(series: Sequence[Series], y: str, *, log: bool = False) -> Any:
    return line_plot(series, x="round", y=y, log=log)


def _communication(run: RunRecord, traffic: Traffic) -> Section:
    if run.baseline:
        return Section("Communication", text="None: a baseline sends nothing.")
    if run.hides_clients:
        return Section("Communication", text=f"{NOT_TOLD} Of one client and round, 'In numbers' tells.")
    names = {key: f"{key[1]}, {key[0]}" for key in traffic.kinds}
    kinds = [(names[key], {"wire bytes": float(amounts[2])}) for key, amounts in traffic.kinds.items()]
    ways = [Series(way, points(run.rows, f"bytes_{way}")) for way in ("up", "down")]
    columns = list(traffic.kinds)
    named = run.client_names()
    order = sorted(traffic.clients, key=lambda client: -sum(traffic.clients[client].values()))
    bars = [(named.get(c, str(c)), {names[k]: float(traffic.clients[c].get(k, 0)) for k in columns}) for c in order]
    by_client = [
        [client, named.get(client, str(client)), *(traffic.clients[client].get(key, 0) for key in columns)]
        for client in sorted(traffic.clients)
    ]
    return Section(
        "Communication",
        [
            Figure(
                "bytes-rounds",
                "Bytes each round",
                line_plot(ways, x="round", y="bytes", y_format=readable_bytes),
                Table(
                    ["round", "bytes_up", "bytes_down"],
                    [[row["round"], row["bytes_up"], row["bytes_down"]] for row in run.rows],
                ),
            ),
            Figure(
                "bytes-kinds",
                "Bytes by direction and kind",
                bar_plot(kinds, what="bytes on the wire, all rounds", form=readable_bytes),
                Table(
                    ["direction", "kind", "records", "payload bytes", "wire bytes"],
                    [[*key, *amounts] for key, amounts in traffic.kinds.items()],
                ),
            ),
            Figure(
                "bytes-clients",
                "Bytes by client",
                bar_plot(spread(bars), what="bytes on the wire, all rounds", form=readable_bytes),
                Table(["client", "name", *names.values()], by_client),
                spread_note(len(bars)),
            ),
        ],
    )


def _bills(run: RunRecord) -> tuple[list[Row], dict[str, str]]:
    """Of every method under the strategies that come along and the run's own; and what is left out, with the reason.

    What other packages announce is not asked: the page of a run says the same wherever it is made.
    """
    facts, config = run.facts or {}, run.config
    if "shapes" not in facts:
        return [], {}
    strategies: dict[str, dict[str, Any]] = {name: {} for name in built_in()}
    if (own := config.get("strategy")) and ":" not in own:  # a class that stands in a file is not run for a page
        strategies[own] = config.get("strategy_arg") or {}
    rank, coding = config["rank"], coding_in(config)
    asked = run.shapes(), list(METHODS), (rank, rank), facts["clients_per_round"], config["rounds"], coding, strategies
    words = config.get("rebase")
    its_own = METHODS[config["method"]].rebase
    moves = None if words is None or words == its_own else read_rebase(words)
    try:
        return bills(*asked, rebase=moves, public=facts.get("public_rows_bytes"))
    except InputError:  # --method head has a rank that no layer need be wide enough for
        return [], {}


def _bill(run: RunRecord) -> list[Section]:
    """What the same run would send under the other methods, by their formulas; this run's own row is marked."""
    try:
        owed, left_out = _bills(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return [Section(BILL, text="It cannot be reckoned: facts.json or config.yaml is not as a run writes it.")]
    if not owed:
        return []
    own = (run.config.get("method"), run.config.get("strategy"))

    def bar(row: Row) -> tuple[str, dict[str, float]]:
        mine = row.method == own[0] and own[1] in row.strategies
        usual = row.strategies[0] not in CARRYING
        return row.method if usual else row.strategies[0], {"this run" if mine else "others": float(row.bill.total)}

    # Of the usual rows: what sends everything twice, or whole matrices, would dwarf the rest.
    drawn = [row for row in owed if "D" not in METHODS[row.method].train and row.strategies[0] != "scaffold"]
    columns = ["method", "strategies that cost the same", "upload bytes", "download bytes", "one off bytes"]
    cells = [
        [row.method, ", ".join(row.strategies), bill.round_up, bill.round_down, bill.one_off, bill.total]
        for row in owed
        for bill in [row.bill]
    ]
    table = Table([*columns, "total bytes"], cells)
    what = "payload bytes, all clients and rounds, one-off included"
    plot = bar_plot(sorted(map(bar, drawn), key=lambda one: -sum(one[1].values())), what=what, form=readable_bytes)
    note = (
        "Of full and of SCAFFOLD, which sends twice as much, the table tells. Upload, download and one-off there are "
        "of one client; downloads of what is merged are those of the last round."
    )
    note += "".join(f" Left out: {reason}." for name, reason in left_out.items() if name not in METHODS)
    text = (
        "What this federation would send under every method and strategy of fedlotr at this rank, by the formulas of "
        "fedlotr cost: payload alone, and as if the clients of a round took part in every one."
    )
    text += " In virtual time they do not; this is a bill of whole rounds." if run.virtual else ""
    figure = Figure("bill", "Total by method", plot, table, note)
    return [Section(BILL, [figure], text)]


def _certificate(run: RunRecord) -> Section:
    keys = ["aggregation_error", "transport_error"]
    keys += ["broadcast_error"] if any("broadcast_error" in row for row in run.rows) else []
    series = [Series(key.replace("_", " "), points(run.rows, key)) for key in keys]
    table = Table(["round", *keys], [[row["round"], *(row.get(key) for key in keys)] for row in run.rows])
    plot = line_plot(series, x="round", y="relative error", log=True)
    note = "" if plot else "No error is defined for this method and strategy: there is no common mean to compare with."
    text = "How far the published update is from the weighted mean of the clients' updates, measured in every round."
    if run.summary.get("codec"):
        text += (
            " The transport error is what the updates' codec loses of that mean (with error feedback, what is made up "
            "for counts too); the broadcast error, by how much what clients are sent differs from the model."
        )
    figures = [Figure("certificate", "Errors over rounds", plot, table, note)]
    return Section("Certificate", figures + _norms(run), text)


def _norms(run: RunRecord) -> list[Figure]:
    """How far the clients' updates went; nothing of runs that do not tell."""
    keys = ["update_norm_median", "update_norm_largest"]
    keys = [key for key in (*keys, "clipped") if any(row.get(key) is not None for row in run.rows)]
    if not keys:
        return []
    named = {"update_norm_median": "median", "update_norm_largest": "largest"}
    series = [Series(name, points(run.rows, key)) for key, name in named.items()]
    table = Table(["round", *keys], [[row["round"], *(row.get(key) for key in keys)] for row in run.rows])
    return [Figure("norms", "Norms of the clients' updates", _lines(series, "norm", log=True), table)]


def _privacy(run: RunRecord) -> list[Section]:
    spent = points(run.rows, "epsilon")
    about = run.summary.get("privacy")
    if not spent and not about:
        return []
    figures = []
    if spent:
        table = Table(["round", "epsilon"], [[row["round"], row.get("epsilon")] for row in run.rows])
        figures.append(Figure("epsilon", "Epsilon spent", _lines([Series("epsilon", spent)], "epsilon"), table))
    if about:
        figures.append(Figure("privacy", "The promise", table=Table(["what", "value"], list(flat(about))), open=True))
    return [Section("Privacy", figures)]


def _clients(run: RunRecord) -> Section:
    if run.hides_clients:
        return Section("Data of the clients", text="Not told: the clients are hidden.")
    if not run.facts or not run.facts.get("partition"):
        return Section(
            "Data of the clients", text="The run directory has no facts.json, which tells what clients hold."
        )
    facts = run.facts
    held, kinds = facts["partition"], kinds_of(facts)
    labels, key = list(kinds.names), kinds.key
    sums = {label: sum(client[key].get(label, 0) for client in held) for label in labels}
    drawn = labels
    if len(labels) > COLOURS:
        drawn = sorted(labels, key=lambda label: -sums[label])[: COLOURS - 1]
    bars: list[tuple[str, dict[str, float]]] = []
    for client in sorted(held, key=lambda client: -client["examples"]):
        parts = {label: float(client[key].get(label, 0)) for label in drawn}
        if len(drawn) < len(labels):
            parts[f"all other {key}"] = client["examples"] - sum(parts.values())
        bars.append((str(client["client"]), parts or {"examples": float(client["examples"])}))
    narrow = len(labels) <= LABEL_COLUMNS
    rows: list[list[Any]] = []
    for at, client in enumerate(held):
        counts = client.get(key, {})
        most = ", ".join(f"{label}: {count}" for label, count in list(counts.items())[:4])
        details = [counts.get(label, 0) for label in labels] if narrow else [len(counts), most]
        rows.append([at, str(client["client"]), client["examples"], *details])
    columns = ["client", "name", "examples", *(labels if narrow else [key, "most frequent"])]
    figures = [
        Figure(
            "clients",
            "Examples and labels of each client" if key == "labels" else f"Examples of each client by {kinds.by}",
            bar_plot(spread(bars), what="examples", form=lambda value: f"{value:,.0f}"),
            Table(columns, rows),
            spread_note(len(bars)),
        )
    ]
    if labels:
        bars = [(label, {"examples": float(sums[label])}) for label in drawn]
        table = Table([kinds.by, "examples"], [[label, sums[label]] for label in labels])
        figures.append(
            Figure(
                "labels", key.capitalize(), bar_plot(bars, what="examples", form=lambda value: f"{value:,.0f}"), table
            )
        )
    return Section("Data of the clients", figures)


def failed(run: RunRecord) -> Section:
    """Who failed, how and when; nothing of hidden clients."""
    if run.hides_clients:
        return Section("Clients that failed", text=NOT_TOLD)
    named = run.client_names()
    rows = [
        [named.get(int(client), client), kind, len(rounds), ", ".join(map(str, rounds))]
        for kind, clients in run.failures().items()
        if kind not in OUTCOMES
        for client, rounds in clients.items()
    ]
    on_purpose = _faults(run)
    if not rows:
        return Section("Clients that failed", on_purpose, text="None.")
    table = Table(["client", "what went wrong", "times", "rounds"], rows)
    failures = Figure("failures", "Failures", table=table, open=True, wide=True)
    return Section("Clients that failed", [failures, *on_purpose])


def _faults(run: RunRecord) -> list[Figure]:
    keys = ("put_in", "refused", "used")
    rows = [[kind, *(counts.get(key) for key in keys)] for kind, counts in run.summary.get("faults", {}).items()]
    table = Table(["kind", "put in", "refused", "used"], rows)
    return [Figure("faults", "Faults on purpose", table=table, open=True)] if rows else []


def _time(run: RunRecord) -> Section:
    keys = ("evaluate_seconds",) if run.hides_clients else ("train_seconds", "evaluate_seconds")
    series = [Series(key.removesuffix("_seconds"), points(run.rows, key)) for key in keys]
    table = Table(["round", *keys], [[row["round"], *(row.get(key) for key in keys)] for row in run.rows])
    figures = [Figure("time", "Seconds each round", _lines(series, "seconds"), table)]
    if run.summary:
        known = Table(["what", "value"], list(flat(run.summary.get("timing", {}))))
        figures.append(Figure("timing", "In all", table=known, open=True))
    return Section("Time", figures)


def _setup(run: RunRecord) -> Section:
    about = [(key, value) for key, value in flat(run.config)]
    figures = [Figure("configuration", "Configuration", table=Table(["key", "value"], about), open=True)]
    versions = (run.summary or run.facts).get("versions") or {}
    facts = {key: value for key, value in run.facts.items() if key not in NOT_LISTED}
    if facts:
        figures.append(Figure("facts", "Model and data", table=Table(["what", "value"], list(flat(facts))), open=True))
    if versions:
        figures.append(
            Figure("versions", "Versions", table=Table(["package", "version"], list(versions.items())), open=True)
        )
    return Section("What was run", figures)


def _again(run: RunRecord) -> Section:
    path = shlex.quote(str(run.folder / "config.yaml"))
    lines = f"python -m fedlotr.simulate {path}"
    if not run.finished:
        lines += (
            f"\n# to go on with it:\npython -m fedlotr.simulate {path} --out {shlex.quote(str(run.folder))} --resume"
        )
    text = "The same seed gives the same bytes with the same versions, threads, number format and kind of processor."
    hashes = {key: value for key, value in run.summary.items() if key.endswith("sha256")}
    figures = []
    if hashes:
        table = Table(["of what", "SHA-256"], [(key.removesuffix("_sha256"), value) for key, value in hashes.items()])
        figures.append(Figure("hashes", "What it should come to", table=table, open=True, wide=True))
    return Section("Do it again", figures, text, lines)
