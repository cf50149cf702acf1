"""Ray and the workers of a run begin to start in a thread, while the main thread loads libraries and checks."""

import threading
from typing import Any, Self

from fedlotr.engines.endings import held_back, let_imports_go_on
from fedlotr.engines.own_ray import OwnRay, end_worker, start_ray
from fedlotr.engines.worker import start_worker, worker_class


class HeadStart:
    """Ray and workers that import a client app before there is a grid; they end with `close`."""

    def __init__(self, client_app: str, workers: int, threads: int = 1) -> None:
        """Begin, and return at once."""
        self._ray: OwnRay | None = None
        self._workers: list[tuple[Any, Any]] = []
        self._error: BaseException | None = None
        self._unwanted = False
        self._begun, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._start, args=(client_app, workers, threads), daemon=True)
        self._thread.start()

    def hand_over(self) -> tuple[OwnRay | None, list[tuple[Any, Any]]]:
        """Ray, which ends with this, and the workers, each with the reference that tells that it has loaded the app.

        The caller ends the workers. Neither where this process was in Ray before. Raises what kept Ray from starting.
        """
        self._begun.wait()
        if self._error is not None:
            raise self._error
        return self._ray, self._workers

    def close(self) -> None:
        """End Ray, and the workers with it; a Ray that is just starting is waited for, or it would leave processes."""
        self._unwanted = True
        with held_back():
            let_imports_go_on()
            self._begun.wait()
            if self._ray is not None:
                own, self._ray = self._ray, None
                if own.lives():
                    for actor, _ in self._workers:
                        end_worker(actor)
                own.stop()
            self._over.set()
            self._thread.join()

    def __enter__(self) -> Self:
        """Closes itself at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _start(self, client_app: str, workers: int, threads: int) -> None:
        try:
            self._ray = start_ray(workers)
            if self._ray is not None and not self._unwanted:
                actor_class = worker_class(client_app, threads)
                self._workers = [start_worker(actor_class) for _ in range(workers)]
        except BaseException as error:  # for whoever asks for the workers
            self._error = error
        self._begun.set()
        self._over.wait()  # on Linux, Ray's processes ask to be killed when the thread ends that has started them
