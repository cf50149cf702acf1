"""LocalGrid: all clients in this process, one job after the other; slow, obvious, and easy to debug."""

import os
import sys
from pathlib import Path

from flwr.app import UserConfig
from flwr.clientapp import ClientApp

from fedlotr.engines.base import CohortRule, Engine
from fedlotr.engines.clients import Clients, limit_threads, load_client_app


class LocalGrid(Engine):
    """A Flower `Grid` without other processes: a job is executed when its reply is pulled."""

    name = "local"

    def __init__(
        self,
        client_app: str | ClientApp,
        num_clients: int,
        *,
        run_config: UserConfig,
        cohorts: CohortRule | None = None,
        threads: int | None = None,
        spill: Path | None = None,
    ) -> None:
        """`client_app` is "module:attribute" or the app itself; with `threads`, this process computes with so many."""
        super().__init__(num_clients, cohorts, spill)
        app = load_client_app(client_app) if isinstance(client_app, str) else client_app
        self._clients = Clients(app, num_clients, dict(run_config))
        if threads is not None:
            limit_threads(threads)
        torch = sys.modules.get("torch")
        self.threads = threads or (torch.get_num_threads() if torch else os.cpu_count() or 1)
        self.workers = 1

    def close(self) -> None:
        """Drop what is queued."""
        self._queue.clear()

    def _advance(self) -> None:
        if self._queue:
            job = self._queue.popleft()
            self._finish(job, *self._clients.execute(job, self._states(job)))
