"""The actor that a worker process is: it loads the client app once, and executes jobs from then on."""

import os
import signal
import sys
from typing import Any

from fedlotr.engines.clients import thread_environment
from fedlotr.engines.own_ray import ray

COMPILED_PRODUCTS = "4096"  # that torch's CPU library keeps, one for each shape; it would keep 1,024


def worker_class(client_app: str, threads: int, workers_per_gpu: int | None = None) -> Any:
    """The actor. Ray sends a local class by value, with all it refers to, to a process that cannot import fedlotr yet.

    So it must not refer to what is ours. And `start` takes no arguments: to read some, Ray would load numpy too early.
    `employ` follows it, when there is a run to work for.
    """
    path = [entry or os.getcwd() for entry in sys.path]
    environment = {**thread_environment(threads), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": COMPILED_PRODUCTS}

    class Worker:
        def start(self) -> None:
            os.environ.update(environment)  # before anything that computes is loaded
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the driver ends the workers
            sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
            from fedlotr.engines.clients import limit_threads, load_client_app
            from fedlotr.flower.private import identify_process
            from fedlotr.libraries import loading_for_good

            identify_process()
            with loading_for_good(whole=not client_app.startswith("fedlotr.")):
                self.app = load_client_app(client_app)
            self.held: dict[str, Any] = {}
            limit_threads(threads)  # torch, if the app loaded it, does not follow the environment in everything

        def employ(self, num_clients: int, run_config: Any) -> None:
            from fedlotr.engines.clients import Clients

            self.clients = Clients(self.app, num_clients, run_config)

        def execute(self, job: Any, states: Any, places: Any, keep: Any, fresh: Any, *records: Any) -> Any:
            self.held = {digest: record for digest, record in self.held.items() if digest in keep}
            self.held.update(zip(fresh, records, strict=True))
            for at, name, digest in places:
                job.messages[at].content[name] = self.held[digest]
            return self.clients.execute(job, states)

    # Ray counts in ten-thousandths; rounded up, the last worker of a GPU would not fit.
    share = 0 if workers_per_gpu is None else 10_000 // workers_per_gpu / 10_000
    return ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(Worker)


def start_worker(actor_class: Any) -> tuple[Any, Any]:
    """A new actor, and the reference that tells that it has loaded the app."""
    actor = actor_class.remote()
    return actor, actor.start.remote()
