"""Runs ``tests/interpreted``, which needs a process of its own in which Triton interprets its kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    triton, numpy = (_version(name) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton 3.6 needs numpy below 2.4"
    return None


def _version(name: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(name).split(".")[:2]))


@pytest.mark.skipif(_obstacle() is not None, reason=str(_obstacle()))
def test_kernels_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Pytest's exit status is 5 when it collects nothing.
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
