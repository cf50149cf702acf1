"""The house stands as it is drawn: imports only point downward, and Flower's private names stay in one module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    (
        "endings",
        "errors",
        "files",
        "formulas",
        "garbage",
        "hub",
        "own",
        "said",
        "streams",
        "wire_form",
        "adapters.methods",
    ),
    ("door", "machine", "preflight", "world"),
    ("yaml_file",),
    ("command_line", "values"),
    ("configuration", "conflicts"),
    ("adapters",),
    ("training",),
    ("privacy",),
    ("data",),
    ("communication",),
    ("flower",),
    ("engines",),
    ("strategies", "billing"),
    ("reporting",),
    (
        *(
            "architectures",
            "baselines",
            "brought",
            "callbacks",
            "contents",
            "devices",
            "federation",
            "handover",
            "model_source",
            "own_model",
            "preparation",
            "processes",
            "promise",
            "public_rows",
            "resumption",
        ),
        *("rounds", "run_directory", "run_log", "simulation", "skeleton", "summary", "unmet", "warm_start"),
    ),
    ("forecast", "grid_file", "testing"),
    ("grid_runs", "grid_tuning"),
    (
        *("cli", "client_app", "compare", "cost", "doctor", "grid", "listing", "report"),
        *("server_app", "simulate", "supervised"),
    ),
)
"""From the ground up. A module stands on the floor of the longest name here that it is, or that it lies within."""
DOOR = (
    "fedlotr.command_line",
    "fedlotr.configuration",
    "fedlotr.conflicts",
    "fedlotr.preflight",
    "fedlotr.values",
    "fedlotr.yaml_file",
)
"""How a configuration is read: on a low floor, so that it imports nothing heavy; used from reporting upward."""
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
MODULES = {
    ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder, name in ((ROOT / "fedlotr", "fedlotr"), (ROOT / "strategies", "fedlotr.strategies"))
    for path in sorted(folder.rglob("*.py"))
}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def floor(module: str) -> int:
    found = [(len(name), n) for n, names in enumerate(FLOORS) for name in names if within(module, f"fedlotr.{name}")]
    assert found, f"{module} has no floor: give it one in FLOORS"
    return max(found)[1]


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
        if within(name, *DOOR) and not within(module, *DOOR):
            assert floor(module) >= floor("fedlotr.reporting"), f"{module} need not know how runs are configured"


def test_a_run_without_privacy_does_not_wait_for_the_accountants() -> None:
    look = "import fedlotr.simulation, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert not {"dp_accounting", "opacus"} & set(found.stdout.split())
