"""Forwards compiled through ``torch.compile(..., backend="specc")``, kept per model."""

from __future__ import annotations

import dataclasses
import logging
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from specc import compat
from specc.errors import CaptureError, CompileError, SpeccError
from specc.options import Options
from specc.progress import part
from specc.runtime.cuda_graph import release_pools

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GraphKey:
    """What tells two graphs of one model apart. Never an address."""

    role: str
    q_len: int
    rows: int

    def __str__(self) -> str:
        tokens = f"{self.q_len} tokens" if self.q_len else "chunks of prompts"
        return f"the {self.role} graph ({tokens}, {self.rows} row{'s' if self.rows > 1 else ''})"


class CompiledForward:
    """A compiled function with the time its first call, which compiles, took."""

    def __init__(self, key: GraphKey, function: types.FunctionType, options: Options) -> None:
        self.key = key
        self.called = False
        self._function = compat.fresh_code(function)
        self._compiled = torch.compile(
            self._function, backend="specc", fullgraph=True, options=_given(options)
        )

    def __call__(self, *args: Any) -> Any:
        try:
            result = self._compiled(*args)
        except compat.dynamo_errors() as error:
            raise _explained(error) from error
        self.called = True
        return result

    def serving(self, *args: Any) -> object:
        """What a call with these arguments would run; None for nothing that is compiled yet."""
        return compat.serving_code(self._function, *args)

    def warm_up(self, *args: Any) -> float:
        """Compile now unless that has happened; seconds it took."""
        if self.called:
            return 0.0
        log.info("compiling %s", self.key)
        start = time.perf_counter()
        with part(f"compiling {self.key}", quiet=not compat.shows_progress()):
            self(*args)
        return time.perf_counter() - start


_FORWARDS: weakref.WeakKeyDictionary[Any, dict[tuple[GraphKey, Options], CompiledForward]] = (
    weakref.WeakKeyDictionary()
)


def compiled_forward(
    model: Any, key: GraphKey, function: Callable[..., Any], options: Options
) -> CompiledForward:
    """The compiled ``function`` of this model under this key, made on first use."""
    forwards = _FORWARDS.setdefault(model, {})
    if (key, options) not in forwards:
        assert isinstance(function, types.FunctionType)
        forwards[key, options] = CompiledForward(key, function, options)
    return forwards[key, options]


def reset() -> None:
    """Forget every compiled forward, and the memory of captured steps."""
    _FORWARDS.clear()
    release_pools()


def _given(options: Options) -> dict[str, Any] | None:
    """Only what differs from the defaults: torch takes an empty dict for no options at all."""
    default = Options()
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Options)
        if getattr(options, field.name) != getattr(default, field.name)
    }
    if "providers" in given:
        given["providers"] = dict(given["providers"])
    return given or None


def _explained(error: Exception) -> SpeccError:
    cause = getattr(error, "inner_exception", None)
    if isinstance(cause, SpeccError):
        return cause
    if compat.is_recompile_limit(error):
        return CaptureError(
            f"the model's forward was captured anew too often, because something it reads keeps changing "
            f"(TORCH_LOGS=recompiles names it): {compat.first_line(error)}. compile=False runs the "
            f"same speculation without capturing it."
        )
    reason = compat.first_line(cause or error)
    if cause is not None:
        return CompileError(
            f"the captured forward could not be compiled ({type(cause).__name__}: {reason}). "
            f"options={{'inductor': False}} runs it as captured; compile=False does not capture it."
        )
    return CaptureError(
        f"the model's forward cannot be captured as one graph: {compat.user_line(error)}: {reason}. "
        f"compile=False runs the same speculation without capturing it."
    )
