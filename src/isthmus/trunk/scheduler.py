"""The scheduler: the one thread that computes on the trunk, and batches the requests of many silos in turn."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from isthmus.errors import IsthmusError, ProtocolError

T = TypeVar("T")
ACTIVE_SECONDS = 0.25
"""Seconds after its last request or answer during which a silo is expected to send another."""
QUEUED_JOBS = 1024
"""Largest number of a silo's waiting jobs."""
QUEUED_BYTES = 2**28
"""Largest number of bytes of a silo's waiting jobs, unless the scheduler is given another."""


class ComputeOver(BaseException):
    """Nothing can be computed here any more, and no request is answered: silos send them again to the process that
    takes this one's place. It is a ``BaseException``, so that it is no request's error.

    Args:
        error: why.
    """

    def __init__(self, error: IsthmusError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(eq=False)
class Job:
    """One request that waits for the compute thread.

    Args:
        lane: the silo and a name. Jobs of one lane run in order, one at a time. An empty lane is a barrier: the job
            runs after all earlier jobs and before all later ones.
        urgent: whether it runs before all others, in order of arrival; its lane is empty.
    """

    kind: JobKind
    lane: tuple[Hashable, ...]
    request: Any
    done: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    """Time of its arrival, or of its last turn."""
    urgent: bool = False

    @property
    def silo(self) -> Hashable:
        """The silo that it is of; None without a lane."""
        return self.lane[0] if self.lane else None

    def settle(self, answer: Callable[[], Any]) -> None:
        """Set the future to the result of ``answer``, or to the error it raises."""
        try:
            self.done.set_result(answer())
        except Exception as error:
            self.done.set_exception(error)


class JobKind(Protocol):
    """A kind of job: how its jobs are chosen and computed together."""

    rests: bool
    """Whether its passes are long. After one for a silo alone that silo's next long one waits as long while others are
    active, so that these have half of the trunk's time."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        """The jobs to run now, chosen among the first ones of each lane, those of the silo whose turn it is first. If
        there are none, also the seconds after which to ask again."""
        ...

    def run(self, jobs: list[Job]) -> None:
        """Compute these jobs. A job whose future is not settled when this returns gets another turn."""
        ...


class SingleJobs:
    """Jobs that run one at a time; a job's request is the function to call."""

    rests = False

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return jobs[:1], 0.0

    def run(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.settle(job.request)


SINGLE = SingleJobs()


def fair_shares(wanted: Mapping[T, int], room: int) -> dict[T, int]:
    """Divide room among those that want some: equal parts, and what one leaves goes to the others."""
    shares = {}
    for place, (one, amount) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[one] = min(amount, -(-room // (len(wanted) - place)))
        room -= shares[one]
    return shares


class Scheduler:
    """Runs all work on the trunk's tensors in one thread, so that none of it needs a lock.

    This includes loading the model: OpenMP keeps a pool of threads for each thread that ever computed, and with more
    threads than cores it stops spinning between kernels, which makes compute a fifth slower.

    Silos take turns: the one whose last turn is longest ago comes first, so that a request waits for at most one turn
    of each other silo, however many requests of theirs came earlier.

    Args:
        queued_bytes: the most bytes of a silo's waiting jobs.
    """

    def __init__(self, queued_bytes: int = QUEUED_BYTES) -> None:
        self._queued_bytes = queued_bytes
        self.tidy: Callable[[], float | None] = lambda: None
        """Called on the compute thread after each turn; returns the seconds after which to call it again, if nothing
        else happens."""
        self._arriving: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        """The job without a lane that is being run."""
        self._turns: Counter[Hashable] = Counter()
        """Number of each silo's last turn."""
        self._rests: dict[Hashable, float] = {}
        """Time until which a silo's long passes wait while other silos are active."""
        self._active: dict[Hashable, float] = {}
        """Time of each silo's last request or answer."""
        self._lock = threading.Lock()
        self._jobs: Counter[Hashable] = Counter()
        """Number of each silo's jobs that are not done."""
        self._bytes: Counter[Hashable] = Counter()
        """Bytes of these jobs."""
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="trunk compute", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Call ``work`` alone, after all earlier jobs and before all later ones. The future gives its result or
        error."""
        return self._put(Job(SINGLE, (), work))

    def submit_urgent(self, work: Callable[[], Any]) -> Future[Any]:
        """Call ``work`` alone, before all other jobs. For what follows from a job that has had its turn."""
        return self._put(Job(SINGLE, (), work, urgent=True))

    def enqueue(self, kind: JobKind, lane: tuple[Hashable, ...], request: Any, nbytes: int = 0) -> Future[Any]:
        """Add a job, to be computed together with others of its kind.

        Args:
            nbytes: bytes of the request.

        Raises:
            ProtocolError: ``QUEUED_JOBS`` jobs of the silo wait, or too many bytes beside other jobs of it.
        """
        job = Job(kind, lane, request)
        silo = job.silo
        with self._lock:
            self._check_room(silo, nbytes)
            self._jobs[silo] += 1
            self._bytes[silo] += nbytes
        job.done.add_done_callback(lambda _: self._leave(silo, nbytes))  # holds no job: a cycle would outlive it
        return self._put(job)

    def _put(self, job: Job) -> Future[Any]:
        self._arriving.put(job)
        return job.done

    @property
    def alive(self) -> bool:
        """Whether the compute thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> Mapping[Hashable, int]:
        """Number of jobs of each silo that are not done."""
        with self._lock:
            return +self._jobs

    @property
    def waiting_bytes(self) -> Mapping[Hashable, int]:
        """Bytes of each silo's jobs that are not done."""
        with self._lock:
            return +self._bytes

    def _check_room(self, silo: Hashable, nbytes: int) -> None:
        jobs, held = self._jobs[silo], self._bytes[silo]
        if jobs >= QUEUED_JOBS or (jobs and held + nbytes > self._queued_bytes):
            raise ProtocolError(
                f"{jobs} requests of {silo} with {held:,} bytes wait on the trunk; "
                f"the limits are {QUEUED_JOBS} and {self._queued_bytes:,}",
                remedy="wait for answers before sending more",
            )

    def _leave(self, silo: Hashable, nbytes: int) -> None:
        with self._lock:
            self._jobs[silo] -= 1
            self._bytes[silo] -= nbytes

    def drop(self, silo: str, error: Exception) -> None:
        """Fail the waiting jobs of this silo. Call it in a job without a lane: later jobs are not affected."""
        for job in self._waiting:
            if job is self._running:
                break
            if job.silo == silo:
                job.done.set_exception(error)

    def stop(self) -> None:
        """End the compute thread after the current turn."""
        self._arriving.put(None)

    def join(self) -> None:
        """Wait until the compute thread has ended."""
        self._thread.join()

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
                if job.lane:
                    self._active[job.silo] = job.since
                job = self._arriving.get_nowait()
            self._stopped = True
        except Empty:
            pass

    def _turn(self) -> float | None:
        """Run an urgent job; or of the kinds that have jobs to run, the one of the silo whose turn it is.

        Returns:
            Seconds until the next turn; None: when the next job arrives.
        """
        self._forget_done()
        urgent = next((job for job in self._waiting if job.urgent), None)
        if urgent is not None:
            self._run([urgent])
            return 0.0
        now, pause = time.monotonic(), None
        for heads in sorted(self._heads().values(), key=lambda jobs: self._place(jobs[0])):
            jobs = [job for job in heads if not self._resting(job, now)]
            if not jobs:
                left = min(self._rests[job.silo] for job in heads) - now
                pause = left if pause is None else min(pause, left)
                continue
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

    def _resting(self, job: Job, now: float) -> bool:
        """Whether the job's silo has just had the trunk for itself, and others that rest less may want it for as
        long."""
        until = self._rests.get(job.silo, 0.0)
        if not job.kind.rests or until <= now:
            return False
        active = {silo for silo, since in self._active.items() if since > now - ACTIVE_SECONDS}
        active |= {other.silo for other in self._waiting if other.lane}
        return any(self._rests.get(silo, 0.0) < until for silo in active - {job.silo})

    def _place(self, job: Job) -> tuple[bool, int, float]:
        """The place of a job: by its silo's last turn, then by time. A barrier comes after all earlier jobs."""
        return not job.lane, self._turns[job.silo], job.since

    def _heads(self) -> dict[JobKind, list[Job]]:
        """The first job of each lane, by kind and in order of ``_place``, up to the first barrier."""
        heads: dict[JobKind, list[Job]] = {}
        lanes: set[tuple[Hashable, ...]] = set()
        for job in self._waiting:
            if job.lane not in lanes:
                lanes.add(job.lane)
                heads.setdefault(job.kind, []).append(job)
            if not job.lane:
                break
        return {kind: sorted(jobs, key=self._place) for kind, jobs in heads.items()}

    def _forget_done(self) -> None:
        self._waiting = [job for job in self._waiting if not job.done.done()]

    def _run(self, jobs: list[Job]) -> None:
        started = time.monotonic()
        turn = max(self._turns.values(), default=0) + 1
        for job in jobs:
            if job.lane:
                self._turns[job.silo] = turn
        self._running = None if jobs[0].lane else jobs[0]
        try:
            jobs[0].kind.run(jobs)
        except Exception as error:
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(error)
        except ComputeOver as over:
            self._stopped = True
            for job in jobs:
                if not job.lane:
                    job.done.set_exception(over.error)
        now = time.monotonic()
        silos = {job.silo for job in jobs}
        if len(silos) == 1 and jobs[0].kind.rests:
            self._rests[jobs[0].silo] = 2 * now - started
        self._active.update(dict.fromkeys(silos - {None}, now))
        for job in jobs:
            job.since = now
