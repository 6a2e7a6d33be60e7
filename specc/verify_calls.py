"""``specc.commit``: the states a verify call left alone move on to the last token that was right."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specc.errors import InputError
from specc.lowerings import commit_conv, commit_snapshots, fold_gated_delta_rule, fold_ssd
from specc.passes.recurrences import GraphRecords, StateRecords

VERIFY_FIRST = "call the model that was compiled with options={'mode': 'verify'}, then commit that call, once"


@dataclasses.dataclass(eq=False)
class VerifyCall:
    """The states that one call of a verify graph read, and what it returned for each; empty if committed."""

    states: list[tuple[StateRecords, Tensor, tuple[Tensor, ...]]]

    @property
    def block(self) -> tuple[int, int, torch.device]:
        """Its rows, its tokens, and where they are."""
        each, state, (first, *_) = self.states[0]
        return first.shape[0], first.shape[2 if each.kind == "convolution" else 1], state.device


@dataclasses.dataclass(frozen=True)
class Accepted:
    """How far each row goes: the arguments of ``commit``, as the operators take them."""

    last: Tensor
    track_rows: Tensor | None
    track_steps: Tensor | None

    @property
    def lengths(self) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None]:
        """base, upto, slots, track_slots and track_upto of a fold: records start with the block."""
        upto = self.last.long() + 1
        track_upto = None if self.track_steps is None else self.track_steps.long() + 1
        return torch.zeros_like(upto), upto, None, self.track_rows, track_upto

    @property
    def steps(self) -> tuple[Tensor, None, Tensor | None, Tensor | None]:
        """last_correct_step_indices, slots, track_slots and steps_to_track of the other commits."""
        return self.last, None, self.track_rows, self.track_steps


class _Calls(threading.local):
    """This thread's newest verify call of each graph, by the first parameter that the graph reads."""

    def __init__(self) -> None:
        self.by_parameter = WeakTensorKeyDictionary()
        self.last: VerifyCall | None = None


_CALLS = _Calls()


def recording(compiled: Callable[..., Any], plan: GraphRecords) -> Callable[..., Any]:
    """``compiled`` without the outputs that are for ``commit``, which are kept until then."""

    def verify(*args: Any) -> Any:
        outputs = compiled(*args)
        call = VerifyCall(
            [
                (each, args[each.state], tuple(outputs[number] for number in each.records))
                for each in plan.states
            ]
        )
        parameter = next((each for each in args if isinstance(each, torch.nn.Parameter)), None)
        if parameter is not None:
            _CALLS.by_parameter[parameter] = call
        _CALLS.last = call
        return outputs[: plan.outputs]

    return verify


def commit(
    compiled: Any,
    last_correct_step_indices: Tensor,
    *,
    mamba_track_indices: Tensor | None = None,
    mamba_steps_to_track: Tensor | None = None,
) -> None:
    """Take over what was right of the last verify call of ``compiled``, in every recurrent layer.

    ``compiled``: a module or a function compiled with ``options={"mode": "verify"}``. Its call left the
    windows and states of its cache as they were. Now those of row b become what they are behind token
    ``last_correct_step_indices[b]`` of the block: int [B], 0 for the first token alone, -1 to leave the row
    as it is. A call is committed once, by the thread that made it, or never. Keys and values are not
    touched.

    mamba_track_indices, mamba_steps_to_track: int [B]; where neither is negative, row b's state behind that
    token also goes to that row of the cache, whose own last_correct_step_indices must be -1.

    Raises InputError where there is nothing to commit, or an argument does not fit the call.
    """
    calls = _open_calls(compiled)
    accepted = Accepted(last_correct_step_indices, mamba_track_indices, mamba_steps_to_track)
    for call in calls:
        _check(call, accepted)
    # States made in inference mode may only be written there; others may be, too.
    with torch.inference_mode():
        for call in calls:
            states, call.states = call.states, []
            _apply(states, accepted)


def _open_calls(compiled: Any) -> list[VerifyCall]:
    kept = _CALLS.by_parameter
    parameters = [each for module in _modules_of(compiled) for each in module.parameters()]
    calls = list(dict.fromkeys(kept[each] for each in parameters if each in kept))
    if not calls and not isinstance(compiled, torch.nn.Module) and _CALLS.last is not None:
        calls = [_CALLS.last]
    if not calls:
        raise InputError(f"specc.commit found no verify call of this thread: {VERIFY_FIRST}")
    left = [call for call in calls if call.states]
    if not left:
        raise InputError(f"the last verify call is committed already: {VERIFY_FIRST}")
    return left


def _modules_of(compiled: Any) -> list[torch.nn.Module]:
    """A compiled module, or the modules that a compiled function or method reads by name."""
    if isinstance(compiled, torch.nn.Module):
        return [compiled]
    function = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    owner = getattr(function, "__self__", None)
    names = inspect.getclosurevars(function) if inspect.isfunction(function) else None
    read = [] if names is None else [*names.nonlocals.values(), *names.globals.values()]
    return [each for each in (owner, *read) if isinstance(each, torch.nn.Module)]


def _check(call: VerifyCall, accepted: Accepted) -> None:
    rows, tokens, device = call.block
    if (accepted.track_rows is None) != (accepted.track_steps is None):
        raise InputError("mamba_track_indices and mamba_steps_to_track are given both or not at all")
    last, track_rows, track_steps = accepted.last, accepted.track_rows, accepted.track_steps
    _check_rows("last_correct_step_indices", last, rows, tokens, device)
    if track_rows is None or track_steps is None:
        return
    _check_rows("mamba_track_indices", track_rows, rows, rows, device)
    _check_rows("mamba_steps_to_track", track_steps, rows, tokens, device)
    # Elsewhere reading values would wait for the device.
    if device.type == "cpu" and bool((last[track_rows[track_rows >= 0].long()] >= 0).any()):
        raise InputError("mamba_track_indices must name rows whose last_correct_step_indices are -1")


def _check_rows(name: str, given: object, rows: int, end: int, device: torch.device) -> None:
    """``given`` must be an integer tensor [rows] on ``device``, with values in [-1, end)."""
    expected = f"{name} must be an int32 or int64 tensor of shape [{rows}] on {device}"
    if not isinstance(given, Tensor):
        raise InputError(f"{expected}, not {type(given).__name__}")
    if given.dtype not in (torch.int32, torch.int64) or given.shape != (rows,) or given.device != device:
        raise InputError(f"{expected}, not {given.dtype} {list(given.shape)} on {given.device}")
    if device.type == "cpu" and bool(((given < -1) | (given >= end)).any()):
        raise InputError(f"{name} must lie in -1 .. {end - 1}, and is {given.tolist()}")


def _apply(states: list[tuple[StateRecords, Tensor, tuple[Tensor, ...]]], accepted: Accepted) -> None:
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for each, state, records in states:
        if each.kind == "convolution":
            commit_conv(state, *records, *accepted.steps)
        elif each.kind == "gated_delta_rule":
            fold_gated_delta_rule(state, *records, *accepted.lengths, each.l2norm)
        elif each.kind == "ssd":
            *rings, a = records
            fold_ssd(state, a, *rings, *accepted.lengths)
        else:
            for tensors, tensor in zip(alike[state.shape, state.dtype], (state, *records), strict=True):
                tensors.append(tensor)
    for pools, snapshots in alike.values():
        commit_snapshots(pools, snapshots, *accepted.steps)
