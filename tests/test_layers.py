"""The house stands as it is drawn: imports only point downward, and Flower's private names stay in one module."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    ("errors", "files", "libraries", "machine", "said", "streams", "reporting.documents"),
    (
        "adapters.kinds",
        "adapters.methods",
        "adapters.moves",
        "communication.attacks",
        "communication.wire_form",
        "fleet.faults",
        "fleet.modes",
        "fleet.sampling",
        "models.kinds",
    ),
    ("config",),
    ("adapters",),
    ("communication",),
    ("fleet",),
    ("models",),
    ("training",),
    ("evaluation",),
    ("data",),
    ("privacy",),
    ("flower",),
    ("engines",),
    ("strategies", "cost"),
    ("reporting",),
    ("run",),
    ("testing",),
    ("grid",),
    ("commands",),
    ("cli", "client_app", "server_app", "simulate"),
)
"""From the ground up. A module stands on the floor of the longest name here that it is, or that it lies within.

The second floor has tables that a configuration needs: they import nothing that is heavy.
"""
INSIDE = {
    "config": (
        "own partitions plain yaml_text",
        "values",
        "preflight",
        "yaml_file",
        "command_line",
        "schema",
        "rules",
        "configuration",
    ),
    "adapters": (
        "prepared",
        "bases kinds methods moves packed quantised",
        "carry cores",
        "layer",
        "experts",
        "stacked",
        "export tuner",
        "going_on gradient_bases start",
        "reduce",
    ),
    "training": (
        *(
            "examples memory optimizers packing",
            "token_losses varlen_attention",
            "own_attention varlen",
            "frozen_prefix readout",
            "varlen_trial",
        ),
        *("model", "varlen_pass", "head backward moving", "cohort", "corrections penalties"),
    ),
    "flower": (
        *(
            "blame fewest fit plugins private reading round_grid workplace",
            "lazy traits",
            "records",
            "certificate serialize",
        ),
        *("federation", "link", "links.first_loss links.moments links.objectives links.ranks links.carry links.hidden"),
        "links.attacks links.draws",
        *(
            "links.codec links.derived",
            "links.bases links.moving",
            "strategy links.personal",
            "chain",
            "replies state",
            "faults norms",
            "trouble asking",
            "timed",
            "round",
        ),
        "client_app scoring template",
    ),
    "engines": ("clients endings flower", "base", "broadcast local own_ray", "worker", "head_start", "ray"),
    "commands": ("door", "compare cost eval export forecast ls report simulate watch", "doctor grid supervised"),
    "reporting": (
        "documents",
        "callbacks escaping lines samples svg",
        "arrivals fitting page",
        "run_record",
        "console loggers",
        "bill card gains grid_table hints spent virtual",
        "report",
        "comparison live",
    ),
    "run": (
        *(
            "base_head baselines brought contents directory examples export fitting_texts layer_ranks log"
            " poison processes public_rows sheet skeleton unmet world",
        ),
        *(
            "callbacks devices resumption warm_start",
            "checking",
            "shown",
            "preparation privacy_plan",
            "federation prompts samples",
            "summary writing",
            "rounds",
        ),
        *("simulation", "merged hub rebuilt", "handover harness"),
    ),
}
"""The order inside the large rooms, from the ground up."""
HOW_A_RUN_IS_CONFIGURED = tuple(
    f"fedlotr.config.{name}" for name in ("command_line", "configuration", "preflight", "rules", "yaml_file")
)
"""No room below the reports knows of it."""
TOP = 13
"""Files that may lie beside the rooms: doors and the ground."""
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
MODULES = {
    ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder, name in ((ROOT / "fedlotr", "fedlotr"), (ROOT / "strategies", "fedlotr.strategies"))
    for path in sorted(folder.rglob("*.py"))
}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _longest(module: str, floors: Sequence[Sequence[str]], above: str) -> int:
    found = [(len(name), n) for n, names in enumerate(floors) for name in names if within(module, f"{above}.{name}")]
    assert found, f"{module} has no floor: give it one"
    return max(found)[1]


def floor(module: str) -> tuple[int, int]:
    """Its room's, and its own in the room."""
    room = module.split(".")[1]
    order = [names.split() for names in INSIDE.get(room, ())]
    above_all = max(len(order) - 1, 0)  # what the room as a whole hands on
    named = order and module not in (f"fedlotr.{room}", f"fedlotr.{room}.links")
    return _longest(module, ROOMS, "fedlotr"), _longest(module, order, f"fedlotr.{room}") if named else above_all


def imports(module: str) -> Iterator[str]:
    """The modules that a module names in its imports, wherever they stand."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{module}: imports are absolute"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES or node.module == "flwr" else node.module


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fedlotr"])
def test_imports_only_point_downward(module: str) -> None:
    for name in imports(module):
        if within(name, "flwr"):
            assert within(name, *PUBLIC_FLOWER) or module == "fedlotr.flower.private", f"{name} is private to Flower"
        if within(name, "flwr", "ray"):
            assert not within(module, "fedlotr.adapters", "fedlotr.training"), f"{module} must run without {name}"
        if not within(name, "fedlotr") or name == "fedlotr":
            continue
        assert floor(name) <= floor(module), f"{module} imports {name}, which stands above it"
        assert within(module, "fedlotr.strategies") or not within(name, "fedlotr.strategies"), (
            f"{module} imports {name}: a built-in strategy has no privilege over a user's"
        )
        if within(name, *HOW_A_RUN_IS_CONFIGURED) and not within(module, "fedlotr.config"):
            assert floor(module)[0] >= floor("fedlotr.reporting")[0], f"{module} need not know how runs are configured"


def test_no_file_imports_itself_over_others() -> None:
    """Imports for type checkers are among them."""
    left = {name: {other for other in imports(name) if other in MODULES} - {name} for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle, or above one: {sorted(left)}"


def test_nothing_but_doors_and_the_ground_lies_at_the_top() -> None:
    files = [path.name for path in (ROOT / "fedlotr").iterdir() if path.is_file()]
    assert len(files) <= TOP, files


def test_a_run_without_privacy_does_not_wait_for_the_accountants() -> None:
    look = "import fedlotr.run.simulation, sys; print(*sys.modules)"
    found = forks.server(*forks.RUN).run(look, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    loaded = set(found.stdout.split())
    assert "fedlotr.run.simulation" in loaded and not {"dp_accounting", "opacus"} & loaded
