"""The ServerApp behind `flwr run .`: the same run, on Flower's own engine instead of one of ours.

Flower's run configuration holds scalars only, so one key names a CONFIG.yaml and the other the folder of the run:

    flwr run . --run-config "config='/absolute/config.yaml' out='/absolute/runs/name'"

An app's working folder is Flower's, hence absolute paths.
"""

import sys
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlotr.commands.door import refuse
from fedlotr.config.configuration import SimulationConfig, load
from fedlotr.engines.flower import FlowerGrid
from fedlotr.errors import InputError
from fedlotr.flower.client_app import OUT
from fedlotr.reporting.console import Console
from fedlotr.run.simulation import run_simulation

CONFIG = "config"
"""Key of the run configuration with the path of a CONFIG.yaml; empty: all defaults."""

app = ServerApp()


def configuration(run_config: dict[str, object]) -> SimulationConfig:
    """The configuration of a run on Flower's engine: clients train one by one. Raises InputError."""
    file, out = str(run_config.get(CONFIG, "")), str(run_config.get(OUT, ""))
    problems = [
        f"{key}: '{given}' is not an absolute path; give it in --run-config \"{key}='...'\""
        for key, given in ((CONFIG, file), (OUT, out))
        if not Path(given).is_absolute() and (given or key == OUT)
    ]
    if problems:
        raise InputError(problems)
    config = load([file] if file else [])
    return config.model_copy(update={"engine": "flower", "workers": None, "cohort": 1, "out": Path(out)})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run it. What goes wrong is raised, so that Flower calls the run failed; the log has it in words first."""
    try:
        config = configuration(dict(context.run_config))
        with Console() as console:
            run_simulation(
                config,
                console=console,
                engine=lambda resolved, _: closing(FlowerGrid(grid, resolved.clients)),
                start=str(context.run_id),
            )
    except InputError as error:
        refuse(error.problems, sys.stdout)
        raise
