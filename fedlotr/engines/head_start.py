"""Ray and the workers of a run begin to start in a thread, while the main thread loads libraries and checks."""

import signal
import sys
import threading
from typing import Any, Self

import ray

from fedlotr.engines.ray import end_worker, interrupts_held_back, start_ray, start_worker, worker_class


class HeadStart:
    """Workers that import a client app before there is a grid; unless a grid takes them over, they end with `close`."""

    def __init__(self, client_app: str, workers: int, threads: int = 1) -> None:
        """Begin, and return at once."""
        self._owns_ray = False
        self._workers: list[tuple[Any, Any]] = []
        self._error: BaseException | None = None
        self._begun, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._start, args=(client_app, workers, threads), daemon=True)
        self._thread.start()

    def hand_over(self) -> list[tuple[Any, Any]]:
        """The workers, each with the reference that tells that it has loaded the app. The caller ends them, and Ray.

        Empty where this process was in Ray before. Raises what kept Ray from starting.
        """
        self._begun.wait()
        if self._error is not None:
            raise self._error
        if self._owns_ray and threading.current_thread() is threading.main_thread():
            # As Ray does where it starts in the main thread: told to end, a run cleans up. By now Ray has put its own
            # handler in the place of whichever was there.
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        self._owns_ray = False
        return self._workers

    def close(self) -> None:
        """End what nobody has taken over; a Ray that is just starting is waited for, or it would leave processes."""
        with interrupts_held_back():
            self._begun.wait()
            if self._owns_ray:
                self._owns_ray = False
                for actor, _ in self._workers:
                    end_worker(actor)
                ray.shutdown()
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
            self._owns_ray = start_ray(workers)
            if self._owns_ray:
                actor_class = worker_class(client_app, threads)
                self._workers = [start_worker(actor_class) for _ in range(workers)]
        except BaseException as error:  # for whoever asks for the workers
            self._error = error
        self._begun.set()
        self._over.wait()  # on Linux, Ray's processes ask to be killed when the thread ends that has started them
