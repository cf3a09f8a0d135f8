"""SIGINT and SIGTERM end a run after its current step, saved."""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType


@contextlib.contextmanager
def stop_on_signal() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM write their number into; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for number, old in previous.items():
            signal.signal(number, old)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
