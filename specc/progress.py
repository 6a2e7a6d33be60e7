"""Long work says what it is: ``with stage("loading weights"): ...`` prints one line to stderr.

``part`` is for work inside: within a stage it adds to its line, by itself it speaks up if it takes long.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import ClassVar, TextIO

TICK_SECONDS = 1.0
PATIENCE_SECONDS = 2.0


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
    with _opened(line):
        yield


@contextlib.contextmanager
def part(name: str, *, quiet: bool = False, stream: TextIO | None = None) -> Iterator[None]:
    """Work that may be over at once: announced only if it is not, and then like a stage.

    Within a stage, its line on a terminal says ``name`` meanwhile. ``quiet`` prints nothing.
    """
    if quiet:
        yield
    elif _Line.current is not None:
        with _Line.current.about(name):
            yield
    else:
        line = _Line(name, stream if stream is not None else sys.stderr, patience=PATIENCE_SECONDS)
        with _opened(line):
            yield


@contextlib.contextmanager
def _opened(line: _Line) -> Iterator[None]:
    outcome = "failed after "
    _Line.current = line
    try:
        yield
        outcome = ""
    finally:
        _Line.current = None
        line.end(outcome)


class _Line:
    """A line being written; with ``patience``, in seconds, not before it is over."""

    current: ClassVar[_Line | None] = None

    def __init__(self, name: str, stream: TextIO, patience: float = 0.0) -> None:
        self._text = f"specc: {name} ..."
        self._detail = ""
        self._stream = stream
        self._start = time.perf_counter()
        self._ended = threading.Event()
        self._patience = patience
        self._shown = False
        self._width = 0
        self._ticker: threading.Thread | None = None
        if not patience:
            self._show()
        if patience or stream.isatty():
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    @contextlib.contextmanager
    def about(self, detail: str) -> Iterator[None]:
        before, self._detail = self._detail, f" {detail}"
        try:
            yield
        finally:
            self._detail = before

    def end(self, prefix: str) -> None:
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        if not self._shown:
            return
        seconds = f"{prefix}{self._elapsed():.1f} s"
        if self._stream.isatty():
            self._rewrite(f"{self._text} {seconds}")
            self._write("\n")
        else:
            self._write(f" {seconds}\n")

    def _show(self) -> None:
        self._shown = True
        self._write(self._text)

    def _tick(self) -> None:
        if self._patience:
            if self._ended.wait(self._patience):
                return
            self._show()
        while self._stream.isatty() and not self._ended.wait(TICK_SECONDS):
            self._rewrite(f"{self._text}{self._detail} {self._elapsed():.0f} s")

    def _rewrite(self, text: str) -> None:
        # Over what stood there, which may have been longer.
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
