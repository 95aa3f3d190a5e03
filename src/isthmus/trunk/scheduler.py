"""The scheduler: the one thread that computes on the trunk, and batches the requests of many silos."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol


@dataclass(eq=False)
class Job:
    """One request that waits for the compute thread.

    Args:
        lane: the silo and a name. Jobs of one lane run in order, one at a time. An empty lane is a barrier: the job
        runs
            after all earlier jobs and before all later ones.
    """

    kind: JobKind
    lane: tuple[Hashable, ...]
    request: Any
    done: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    """Time of its arrival, or of its last turn."""

    def settle(self, answer: Callable[[], Any]) -> None:
        """Set the future to the result of ``answer``, or to the error it raises."""
        try:
            self.done.set_result(answer())
        except Exception as error:
            self.done.set_exception(error)


class JobKind(Protocol):
    """A kind of job: how its jobs are chosen and computed together."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        """The jobs to run now, chosen among the first ones of each lane. If there are none, also the seconds after
        which to ask again."""
        ...

    def run(self, jobs: list[Job]) -> None:
        """Compute these jobs. A job whose future is not settled when this returns gets another turn."""
        ...


class SingleJobs:
    """Jobs that run one at a time; a job's request is the function to call."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return jobs[:1], 0.0

    def run(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.settle(job.request)


SINGLE = SingleJobs()


class Scheduler:
    """Runs all work on the trunk's tensors in one thread, so that none of it needs a lock.

    This includes loading the model: OpenMP keeps a pool of threads for each thread that ever computed, and with more
    threads than cores it stops spinning between kernels, which makes compute a fifth slower.
    """

    def __init__(self) -> None:
        self.tidy: Callable[[], float | None] = lambda: None
        """Called on the compute thread after each turn; returns the seconds after which to call it again, if nothing
        else happens."""
        self._arriving: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: list[Job] = []
        self._stopped = False
        threading.Thread(target=self._work, name="trunk compute", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Call ``work`` alone, after all earlier jobs and before all later ones. The future gives its result or
        error."""
        return self.enqueue(SINGLE, (), work)

    def enqueue(self, kind: JobKind, lane: tuple[Hashable, ...], request: Any) -> Future[Any]:
        """Add a job, to be computed together with others of its kind."""
        job = Job(kind, lane, request)
        self._arriving.put(job)
        return job.done

    def drop(self, silo: str, error: Exception) -> None:
        """Fail the waiting jobs of this silo. Call it in a job without a lane: later jobs are not affected."""
        for job in self._waiting:
            if not job.lane:
                break
            if job.lane[:1] == (silo,):
                job.done.set_exception(error)
        self._forget_done()

    def stop(self) -> None:
        """End the compute thread after the current turn."""
        self._arriving.put(None)

    def _work(self) -> None:
        pause: float | None = None
        while not self._stopped:
            self._receive(pause)
            pauses = self._turn(), self.tidy()
            pause = min((one for one in pauses if one is not None), default=None)

    def _receive(self, pause: float | None) -> None:
        """Move arrived jobs to the waiting ones.

        Args:
            pause: seconds to wait for the first one; None: without limit.
        """
        try:
            job = self._arriving.get(timeout=pause) if pause != 0.0 else self._arriving.get_nowait()
            while job is not None:
                self._waiting.append(job)
                job = self._arriving.get_nowait()
            self._stopped = True
        except Empty:
            pass

    def _turn(self) -> float | None:
        """Run the kind whose first job has waited longest and that has jobs to run.

        Returns:
            Seconds until the next turn; None: when the next job arrives.
        """
        self._forget_done()
        now, pause = time.monotonic(), None
        for jobs in sorted(self._heads().values(), key=lambda jobs: min(job.since for job in jobs)):
            try:
                chosen, seconds = jobs[0].kind.gather(jobs, now)
            except Exception as error:  # a kind examines its first job first
                jobs[0].done.set_exception(error)
                return 0.0
            if chosen:
                self._run(chosen)
                return 0.0
            pause = seconds if pause is None else min(pause, seconds)
        return pause

    def _heads(self) -> dict[JobKind, list[Job]]:
        """The first job of each lane, by kind, up to the first job without a lane."""
        heads: dict[JobKind, list[Job]] = {}
        lanes: set[tuple[Hashable, ...]] = set()
        for job in self._waiting:
            if job.lane not in lanes:
                lanes.add(job.lane)
                heads.setdefault(job.kind, []).append(job)
            if not job.lane:
                break
        return heads

    def _forget_done(self) -> None:
        self._waiting = [job for job in self._waiting if not job.done.done()]

    def _run(self, jobs: list[Job]) -> None:
        try:
            jobs[0].kind.run(jobs)
        except Exception as error:
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(error)
        now = time.monotonic()
        for job in jobs:
            job.since = now
