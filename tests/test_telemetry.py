"""Neither Flower nor Ray reports home, and nothing of ours does: docs/telemetry.md promises it."""

import os
import subprocess
import sys

import pytest

CODE = """
import fedlotr.engines.own_ray as own_ray
from fedlotr.engines.own_ray import variables
from flwr.supercore import telemetry
from ray._common.usage import usage_lib

with variables():
    print(telemetry.FLWR_TELEMETRY_ENABLED, usage_lib.usage_stats_enabled())
"""
NAMES = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")


@pytest.mark.parametrize(("chosen", "wanted"), [({}, "0 False"), (dict.fromkeys(NAMES, "1"), "1 True")])
def test_flower_and_ray_are_told_to_report_nothing_unless_the_user_says_otherwise(
    chosen: dict[str, str], wanted: str
) -> None:
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", CODE], env={**env, **chosen}, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == wanted, done.stderr
