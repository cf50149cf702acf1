"""RayGrid: clients in worker processes that load the app once, are replaced when they die, and end with the run."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message, UserConfig

from fedlotr.engines.base import CohortRule, Engine, log
from fedlotr.engines.broadcast import Broadcast
from fedlotr.engines.clients import Job, failure
from fedlotr.engines.endings import held_back
from fedlotr.engines.head_start import HeadStart
from fedlotr.engines.own_ray import OwnRay, end_worker, ray, start_ray
from fedlotr.engines.worker import start_worker, worker_class
from fedlotr.errors import FedlotrError
from fedlotr.flower.private import CLIENT_CRASHED, CLIENT_RAISED

POLL_SECONDS = 0.1
DEATHS_OF_A_SUSPECT = 2  # a worker may die by chance; a job over which two died is to blame
FALSE_STARTS = 3  # for each worker, in a row, until the fault is taken to be lasting
DEATH = (
    *(ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError),
    *(ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError),
)


class RayGrid(Engine):
    """A Flower `Grid` of Ray actors, whose replies do not depend on how many they are.

    Workers start in the background; `warm_up` waits for them. One that dies is replaced, and its job repeated. A job
    over which two died is split into its clients; a client over which two died gets an error reply. Pulling raises
    FedlotrError where the workers cannot start.
    """

    name = "ray"

    def __init__(
        self,
        client_app: str,
        num_clients: int,
        *,
        run_config: UserConfig,
        cohorts: CohortRule | None = None,
        workers: int,
        workers_per_gpu: int | None = None,
        threads: int = 1,
        spill: Path | None = None,
        address: str | None = None,
        head_start: HeadStart | None = None,
    ) -> None:
        """Start workers that import `client_app` ("module:attribute") and compute with so many `threads` each.

        Ray is started too, and stopped by `close`, unless this process is in it already or an `address` says which
        cluster to join; then it must have a CPU for each worker, and is left by `close` as it was.
        workers_per_gpu: how many share one GPU, the only one that each of them sees; None: they need none.
        head_start: Ray and workers of the same app and threads, which need no GPU and are starting already.
        """
        super().__init__(num_clients, cohorts, spill)
        self.workers = workers
        self.threads = threads
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Job | None]] = {}  # by the reference of the result; no job: it is starting
        self.broadcast = Broadcast(ray.put)
        self._false_starts = 0
        self._ray: OwnRay | None = None
        self._owns_ray = False
        begun: list[tuple[Any, Any]] = []
        try:
            if head_start is not None:
                self._ray, begun = head_start.hand_over()
            if self._ray is None:
                self._ray = start_ray(workers, address)
                self._owns_ray = self._ray is not None
            found = ray.cluster_resources()  # type: ignore[no-untyped-call]
            if (cpus := found.get("CPU", 0)) < workers:
                raise FedlotrError(f"Ray runs with {cpus:g} CPUs and {workers} workers need one each: lower --workers")
            if workers_per_gpu is not None and (gpus := found.get("GPU", 0)) * workers_per_gpu < workers:
                raise FedlotrError(
                    f"Ray runs with {gpus:g} GPUs and {workers} workers share one by {workers_per_gpu}: lower "
                    "--workers, or raise --workers-per-gpu"
                )
            self._actor_class = worker_class(client_app, threads, workers_per_gpu)
            self._employment = (num_clients, dict(run_config))
            for at in range(workers):
                self._employ(*(begun[at] if at < len(begun) else start_worker(self._actor_class)))
        except BaseException:
            self.close()
            raise

    def warm_up(self) -> None:
        """Wait until every worker has loaded the app."""
        while any(job is None for _, job in self._busy.values()):
            self._advance()

    def close(self) -> None:
        """Drop what is queued, end the workers, and Ray if it was started here."""
        with held_back():
            self._queue.clear()
            self.broadcast.clear()
            actors = [*self._idle, *(actor for actor, _ in self._busy.values())]
            self._idle, self._busy = [], {}
            if self._ray is None or self._ray.lives():  # else it would be looked for, for a minute
                for actor in actors:
                    end_worker(actor)
            if self._ray is not None and self._owns_ray:
                own, self._ray = self._ray, None
                own.stop()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """As `Engine.push_messages`; idle workers have their jobs when it returns."""
        ids = super().push_messages(messages)
        self.broadcast.pushed(self._queue)
        self._dispatch()
        return ids

    def _employ(self, actor: Any, started: Any) -> None:
        actor.employ.remote(*self._employment)  # an actor does one thing after the other, as they were asked of it
        self._busy[started] = (actor, None)

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            actor, job = self._idle.pop(), self._queue.popleft()
            parcel = self.broadcast.parcel(job, actor)
            words = (parcel.job, self._states(job), parcel.places, parcel.keep, parcel.fresh, *parcel.references)
            self._busy[actor.execute.remote(*words)] = (actor, job)

    def _advance(self) -> None:
        if not self._busy and not self._idle:
            raise FedlotrError("there are no workers: the grid is closed, or none could start")
        if self._ray is not None:
            self._ray.check()
        self._dispatch()
        done, _ = ray.wait(list(self._busy), timeout=POLL_SECONDS) if self._busy else ([], [])
        for reference in done:
            self._collect(reference)
        self._dispatch()

    def _collect(self, reference: Any) -> None:
        """Take what a worker brings: the outcomes of a job, the news that it has started, or its death."""
        actor, job = self._busy[reference]
        try:
            result = ray.get(reference)
        except DEATH as death:
            del self._busy[reference]
            self._bury(actor, job, death)
            return
        except Exception as error:  # the worker lives, and what clients raise becomes a reply: the app is at fault
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            if job is None:  # its reference stays, so that every pull says so: without the app there is nothing to do
                raise FedlotrError(f"a worker cannot load the client app: {cause}") from error
            self.broadcast.forget(actor)  # it may have raised before it had taken what it was handed
            self._split(job, f"{type(cause).__name__}: {cause}", CLIENT_RAISED)
        else:
            if job is None:
                self._false_starts = 0
            else:
                self._finish(job, *result)
        del self._busy[reference]
        self._idle.append(actor)

    def _bury(self, actor: Any, job: Job | None, death: Exception) -> None:
        """Replace a worker that died, and repeat or split its job."""
        last_words = str(death).partition("\n")[0]
        self._replace(actor, f"a worker died during {job or 'its start'} ({last_words})")
        if job is None:
            self._false_starts += 1
            if self._false_starts >= FALSE_STARTS * self.workers:
                self.close()
                raise FedlotrError(f"the workers die as they start: {death}") from death
        elif job.deaths + 1 < DEATHS_OF_A_SUSPECT:
            self._queue.appendleft(replace(job, deaths=job.deaths + 1))
        else:
            self._split(job, f"its worker died {DEATHS_OF_A_SUSPECT} times: {last_words}", CLIENT_CRASHED)

    def _replace(self, actor: Any, reason: str) -> None:
        end_worker(actor)
        self.broadcast.forget(actor)
        self.restarts += 1
        log.warning("%s; restart %d", reason, self.restarts)
        self._employ(*start_worker(self._actor_class))

    def _split(self, job: Job, reason: str, code: int) -> None:
        """Find the culprit: the clients of a failed cohort are tried one by one; a single client has failed."""
        if len(job.messages) > 1:
            log.warning("%s failed together (%s); each client is tried alone", job, reason)
            self._queue.extendleft(Job((message,)) for message in reversed(job.messages))
        else:
            self._finish(job, [failure(job.messages[0], reason, code)])

    def _give_up(self, message_ids: set[str]) -> None:
        super()._give_up(message_ids)
        for reference, (actor, job) in list(self._busy.items()):
            if job is not None and not self._is_expected(job):
                del self._busy[reference]
                self._replace(actor, f"{job} took too long")
