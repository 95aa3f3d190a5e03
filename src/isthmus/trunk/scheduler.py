"""The scheduler: one thread that owns the trunk's compute. Jobs run in the order they come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Scheduler:
    """Everything that touches the trunk's tensors runs here, so that nothing there needs a lock.

    Loading the model too: OpenMP keeps a pool of threads for each thread that ever computed, and with more of them
    than cores it no longer waits actively between kernels. Compute then takes a fifth longer.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="trunk compute", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run the job later; the future has its result or its exception."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                result = job()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        self._jobs.put(run)
        return done

    def stop(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()
