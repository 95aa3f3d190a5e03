"""Patience that ends when a test says so, whatever the machine's speed."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """The clocks of all barriers made under it; none runs out by itself."""

    def __init__(self) -> None:
        self._running: list[HandTimer] = []

    def timer(self, seconds: float, function: Callable[[], None]) -> HandTimer:
        """In place of ``threading.Timer``."""
        return HandTimer(function, self._running)

    def run_out(self) -> None:
        """Whoever is waited for now has lost its turn."""
        for timer in list(self._running):
            timer.cancel()
            timer.function()


class HandTimer:
    """A timer that only ``Clock.run_out`` fires."""

    daemon = False

    def __init__(self, function: Callable[[], None], running: list[HandTimer]) -> None:
        self.function, self._running = function, running

    def start(self) -> None:
        self._running.append(self)

    def cancel(self) -> None:
        if self in self._running:
            self._running.remove(self)
