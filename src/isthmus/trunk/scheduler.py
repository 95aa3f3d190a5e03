"""The scheduler: one thread that owns the trunk's compute and runs the requests of many silos together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

Done = Future[Any]


@dataclass(eq=False)
class Job:
    """One request that waits for the compute thread.

    Args:
        lane: the silo and a name; jobs of one lane keep their order, one at most is under way. Empty: of all silos.
    """

    kind: Kind
    lane: tuple[Hashable, ...]
    request: Any
    done: Done = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    """When it came, or last had a turn."""

    def settle(self, answer: Callable[[], Any]) -> None:
        """Its answer is what this gives; or raises, which is then nobody else's error."""
        try:
            self.done.set_result(answer())
        except Exception as error:
            self.done.set_exception(error)


class Kind(Protocol):
    """One kind of job and how its jobs are computed together."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        """Choose from the first job of each lane those to run now; or none, and the seconds until it should be asked
        again."""
        ...

    def run(self, jobs: list[Job]) -> None:
        """Compute. A job whose future is not settled by then has another turn."""
        ...


class Alone:
    """Jobs that are run by themselves."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return jobs[:1], 0.0

    def run(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.settle(job.request)


ALONE = Alone()


class Scheduler:
    """Everything that touches the trunk's tensors runs here, so that nothing there needs a lock.

    Loading the model too: OpenMP keeps a pool of threads for each thread that ever computed, and with more of them
    than cores it no longer waits actively between kernels. Compute then takes a fifth longer.
    """

    def __init__(self) -> None:
        self._arriving: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: list[Job] = []
        self._stopped = False
        threading.Thread(target=self._work, name="trunk compute", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Done:
        """Run this later, by itself and before anything that comes after it; gives its result or its exception."""
        return self.enqueue(ALONE, (), work)

    def enqueue(self, kind: Kind, lane: tuple[Hashable, ...], request: Any) -> Done:
        """Have this computed with others of its kind."""
        job = Job(kind, lane, request)
        self._arriving.put(job)
        return job.done

    def drop(self, silo: str, error: Exception) -> None:
        """Fail what this silo's last process left waiting; to be called by a job of no lane, which came after it."""
        for job in self._waiting:
            if not job.lane:
                break
            if job.lane[:1] == (silo,):
                job.done.set_exception(error)
        self._forget_done()

    def stop(self) -> None:
        self._arriving.put(None)

    def _work(self) -> None:
        pause: float | None = None
        while not self._stopped:
            self._receive(pause)
            pause = self._turn()

    def _receive(self, pause: float | None) -> None:
        """Take in what has arrived; if nothing is to be done, wait for it, at most so many seconds."""
        try:
            job = self._arriving.get(timeout=pause) if pause != 0.0 else self._arriving.get_nowait()
            while job is not None:
                self._waiting.append(job)
                job = self._arriving.get_nowait()
            self._stopped = True
        except Empty:
            pass

    def _turn(self) -> float | None:
        """Run what is due and has waited longest. Returns the seconds until there is more to do."""
        self._forget_done()
        now, pause = time.monotonic(), None
        for jobs in sorted(self._heads().values(), key=lambda jobs: min(job.since for job in jobs)):
            try:
                chosen, seconds = jobs[0].kind.gather(jobs, now)
            except Exception as error:  # only the first job is looked at by itself
                jobs[0].done.set_exception(error)
                return 0.0
            if chosen:
                self._run(chosen)
                return 0.0
            pause = seconds if pause is None else min(pause, seconds)
        return pause

    def _heads(self) -> dict[Kind, list[Job]]:
        """By kind, the first job of each lane; what came after a job of no lane waits for it."""
        heads: dict[Kind, list[Job]] = {}
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
