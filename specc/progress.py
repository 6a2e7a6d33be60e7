"""Long work says what it is: ``with stage("loading weights"): ...`` prints one line to stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

TICK_SECONDS = 1.0


@contextlib.contextmanager
def stage(name: str, *, quiet: bool = False, stream: TextIO | None = None) -> Iterator[None]:
    """Announce ``name`` on ``stream`` (stderr by default) and, when it ends, the seconds it took.

    On a terminal the line is rewritten while the work goes on. Stages do not nest. ``quiet`` prints
    nothing.
    """
    if quiet:
        yield
        return
    line = _Line(name, stream if stream is not None else sys.stderr)
    outcome = "failed after "
    try:
        yield
        outcome = ""
    finally:
        line.end(outcome)


class _Line:
    def __init__(self, name: str, stream: TextIO) -> None:
        self._text = f"specc: {name} ..."
        self._stream = stream
        self._start = time.perf_counter()
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._write(self._text)
        if stream.isatty():
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def end(self, prefix: str) -> None:
        self._ended.set()
        seconds = f"{prefix}{self._elapsed():.1f} s\n"
        if self._ticker is None:
            self._write(f" {seconds}")
        else:
            self._ticker.join()
            self._write(f"\r{self._text} {seconds}")

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._write(f"\r{self._text} {self._elapsed():.0f} s")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
