"""The state_commit pass alone: over specc's cache, over states that are inputs, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from specc.errors import UnsupportedError
from specc.lowerings import causal_conv1d, fold_gated_delta_rule, fold_ssd, recurrent_state
from specc.options import Options
from specc.passes import PassResult, canonicalize, state_commit
from specc.passes.framework import PassContext, run_passes
from specc.passes.recurrences import GraphRecords
from tests.passes.attention_graphs import AsItSays, Run, compiled, compiled_once
from tests.passes.recurrent_graphs import (
    EVERY,
    GATED_DELTA,
    KINDS,
    ROWS,
    SSD,
    Kind,
    inputs,
    lengths,
    over_window,
    over_window_token,
    weights,
    window,
)

PASSES = (canonicalize.PASS, state_commit.PASS)
VERIFY = Options(mode="verify")
SNAPSHOT = Options(mode="verify", state_commit="snapshot")

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def reasons(run: Run) -> list[tuple[str, str]]:
    return [(remark.status, remark.reason) for remark in run.results[-1].remarks]


# --- over specc's cache ------------------------------------------------------------------------


def over_rings(kind: Kind, *, exact: bool = False) -> Callable[..., Tensor]:
    """As the cache's layers have it: captured, a recurrence over a stand-in; else what that means."""
    replay = kind.operators[1]

    def function(tokens: Any, state: Tensor, rings: list[Tensor], lens: Any, *, keep: bool = False) -> Tensor:
        if not torch.compiler.is_compiling():
            return replay(*tokens, state, *rings, *lens, None, *kind.settings, EVERY, exact)
        stand_in = torch.ops.specc.recurrent_state(state, rings, *lens, EVERY, exact)
        out, final = kind(tokens, stand_in)
        if keep:
            stand_in.copy_(final)
        return out

    return function


def over_snapshots(kind: Kind) -> Callable[..., Tensor]:
    """The state behind position p lies in entry p % R."""

    def function(tokens: Any, kept: Tensor, lens: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return kind(tokens, torch.ops.specc.recurrent_state(kept, [], *lens, EVERY, False))[0]
        out, before = [], kept[torch.arange(ROWS), (lens[1] - 1) % kept.shape[1]]
        for token in range(tokens[0].shape[1]):
            one = tuple(each[:, token : token + 1] if each.dim() > 1 else each for each in tokens)
            y, before = kind(one, before)
            kept[torch.arange(ROWS), (lens[1] + token) % kept.shape[1]] = before
            out.append(y)
        return torch.cat(out, 1)

    return function


@kinds
@pytest.mark.parametrize("q_len", [1, 4])
def test_over_rings(kind: Kind, q_len: int) -> None:
    call = (kind.tokens(q_len), *kind.pool(), lengths())
    run = compiled_once(over_rings(kind), call, passes=PASSES, options=VERIFY)
    functional, replay, _ = kind.operators
    assert run.count(replay) == 1
    assert run.count(functional, recurrent_state) == 0
    assert reasons(run) == [("fired", f"recurrence over specc's cache is specc::{kind.name}_replay")]
    assert state_commit.records_of(run.after) is None, "the cache keeps the records"


@kinds
def test_what_the_cache_says_of_exactness_goes_with_it(kind: Kind) -> None:
    call = (kind.tokens(3), *kind.pool(), lengths())
    run = compiled_once(over_rings(kind, exact=True), call, passes=PASSES, options=VERIFY)
    (node,) = run.after.graph.find_nodes(op="call_function", target=kind.operators[1])
    assert node.args[-2:] == (EVERY, True)


@kinds
def test_state_kept_behind_one_token_is_dropped(kind: Kind) -> None:
    def keeping(*call: Any) -> Tensor:
        return over_rings(kind)(*call, keep=True)

    call = (kind.tokens(1), *kind.pool(), lengths())
    run = compiled_once(keeping, call, passes=PASSES, options=VERIFY)
    assert run.count("copy_") == 0


@kinds
@pytest.mark.parametrize("q_len", [1, 5])
def test_over_snapshots(kind: Kind, q_len: int) -> None:
    ring = torch.randn(ROWS, 7, *kind.state)
    call = (kind.tokens(q_len), ring, lengths())
    run = compiled_once(over_snapshots(kind), call, passes=PASSES, options=VERIFY)
    functional, _, snapshot = kind.operators
    assert (run.count(snapshot), run.count("index_put_")) == (1, 1)
    assert run.count(functional, recurrent_state) == 0
    assert reasons(run) == [("fired", f"recurrence over specc's cache is specc::{kind.name}_snapshot")]


@kinds
def test_layers_share_what_depends_on_lengths_alone(kind: Kind) -> None:
    one = over_snapshots(kind)

    def layers(tokens: Any, kept: list[Tensor], lens: Any) -> Tensor:
        total = one(tokens, kept[0], lens)
        for each in kept[1:]:
            total = total + one(tokens, each, lens)
        return total

    call = (kind.tokens(3), [torch.randn(ROWS, 7, *kind.state) for _ in range(3)], lengths())
    run = compiled_once(layers, call, passes=PASSES, options=VERIFY)
    assert run.count(kind.operators[2]) == 3
    assert run.count(torch.arange) == 2, "rows, and a block's tokens"


@kinds
def test_blocks_of_any_length(kind: Kind) -> None:
    calls = [(kind.tokens(q_len), *kind.pool(), lengths()) for q_len in (3, 5, 6)]
    runs = compiled(over_rings(kind), *calls, passes=PASSES, options=VERIFY)
    assert [run.count(kind.operators[1]) for run in runs] == [1, 1]
    calls = [(kind.tokens(q_len), torch.randn(ROWS, 9, *kind.state), lengths()) for q_len in (3, 5, 6)]
    runs = compiled(over_snapshots(kind), *calls, passes=PASSES, options=VERIFY)
    assert [run.count(kind.operators[2]) for run in runs] == [1, 1]


# --- over states that are inputs ---------------------------------------------------------------


def layer(kind: Kind) -> Callable[..., Tensor]:
    """A convolution and a recurrence over a cache layer of transformers, side by side."""

    def function(x: Tensor, tokens: Any, kept: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Any:
        convolve = over_window_token if x.shape[2] == 1 else over_window
        convolved = convolve(x, kept, weight, bias)
        out, final = kind(tokens, state)
        state.copy_(final)
        return convolved, out

    return function


@dataclasses.dataclass
class Verified:
    """What a verify graph did on real tensors."""

    run: Run
    outputs: list[Tensor]
    placeholders: list[Tensor]

    @property
    def plan(self) -> GraphRecords:
        plan = state_commit.records_of(self.run.after)
        assert plan is not None
        return plan

    def records(self, kind: str) -> tuple[Tensor, list[Tensor]]:
        """The state of the only layer of this kind, and what the graph returned for it."""
        (each,) = (each for each in self.plan.states if each.kind == kind)
        return self.placeholders[each.state], [self.outputs[number] for number in each.records]


def verified(fn: Callable[..., Any], *args: Any, options: Options = VERIFY, **settings: Any) -> Verified:
    """Capture ``fn``, run the passes and then the graph; its own outputs must be the captured ones."""
    made: list[Verified] = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        before = GraphModule(gm, copy.deepcopy(gm.graph))
        run = Run(before, gm, run_passes(gm, PASSES, PassContext(options)))

        def call(*inputs: Any) -> Any:
            outputs = AsItSays(gm).run(*inputs)
            made.append(Verified(run, list(outputs), list(inputs)))
            return outputs

        return call

    torch.compiler.reset()
    expected = fn(*copy.deepcopy(args))
    with torch.no_grad():
        result = torch.compile(fn, backend=backend, fullgraph=True, **settings)(*args)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    return made[-1]


def layer_args(kind: Kind, q_len: int) -> tuple[Any, ...]:
    return inputs(q_len), kind.tokens(q_len), window(), kind.pool()[0], *weights()


@kinds
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("options", [VERIFY, SNAPSHOT], ids=["replay", "snapshot"])
def test_states_are_left_to_a_commit(kind: Kind, q_len: int, options: Options) -> None:
    args = layer_args(kind, q_len)
    kept, state = args[2].clone(), args[3].clone()
    after = verified(layer(kind), *args, options=options)
    run, form = after.run, kind.operators[1 if options is VERIFY else 2]
    assert (run.count(form), run.count(causal_conv1d.overload)) == (1, 1)
    assert run.count(kind.operators[0], "copy_", torch.cat, recurrent_state) == 0
    assert torch.equal(args[2], kept)
    assert torch.equal(args[3], state)
    assert [reason for _, reason in reasons(run)] == [
        "convolution leaves its window to a commit",
        f"recurrence leaves its state to a commit: {form._schema.name}",
    ]
    assert after.plan.outputs == 2
    assert len(after.outputs) == 2 + sum(len(each.records) for each in after.plan.states)


@kinds
@pytest.mark.parametrize("last", [(3, 0), (-1, 2), (1, 3)])
def test_records_lead_to_the_state_behind_each_token(kind: Kind, last: tuple[int, int]) -> None:
    args = layer_args(kind, 4)
    after, snapshots = (verified(layer(kind), *copy.deepcopy(args), options=o) for o in (VERIFY, SNAPSHOT))
    state, records = after.records(kind.name)
    _, (behind,) = snapshots.records("snapshots")
    upto = torch.tensor(last) + 1
    where = (torch.zeros(ROWS, dtype=torch.int64), upto, None, None, None)
    if kind is GATED_DELTA:
        fold_gated_delta_rule(state, *records, *where, kind.settings[-1])
    else:
        *rings, a = records
        fold_ssd(state, a, *rings, *where)
    for row, count in enumerate(upto.tolist()):
        expected = behind[row, count - 1] if count else args[3][row]
        torch.testing.assert_close(state[row], expected, atol=1e-5, rtol=1e-5)


@kinds
def test_verify_of_blocks_of_any_length(kind: Kind) -> None:
    for options in (VERIFY, SNAPSHOT):
        after = verified(layer(kind), *layer_args(kind, 5), options=options, dynamic=True)
        assert after.run.refusals == []


def test_exact_is_the_options() -> None:
    for exact in (False, True):
        options = Options(mode="verify", exact=exact)
        after = verified(layer(GATED_DELTA), *layer_args(GATED_DELTA, 3), options=options).run.after
        (node,) = after.graph.find_nodes(op="call_function", target=GATED_DELTA.operators[1])
        assert node.args[-1] is exact


@kinds
def test_nothing_happens_without_the_mode(kind: Kind) -> None:
    run = compiled_once(layer(kind), layer_args(kind, 4), passes=PASSES)
    assert (run.count(kind.operators[0]), run.count("copy_")) == (1, 2)
    assert run.results[-1] == PassResult()


# --- refusals ----------------------------------------------------------------------------------


def without_write_back(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return over_window_token(x, kept.clone(), weight, bias)


def other_window(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.ops.specc.causal_conv1d(x, kept, weight, bias, "silu")
    kept.copy_(torch.cat([kept, x * 2], dim=-1)[..., -kept.shape[-1] :])
    return out


def shorter_window(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.ops.specc.causal_conv1d(x, kept, weight, bias, "silu")
    kept.copy_(torch.cat([kept, x], dim=-1)[..., -1:])
    return out


def window_read_later(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return over_window_token(x, kept, weight, bias) + kept.sum()


def window_changed_first(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kept[:, 0].mul_(2)
    return over_window_token(x, kept, weight, bias)


def inputs_changed_later(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    block = x + 1
    out = over_window_token(block, kept, weight, bias)
    block.mul_(2)
    return out


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (inputs_changed_later, "changes what a commit is to read"),
        (without_write_back, "starts from no cached window"),
        (other_window, "in another way than its inputs do"),
        (shorter_window, "in another way than its inputs do"),
        (window_read_later, "reads a recurrent state that a commit is to write"),
        (window_changed_first, "changes a recurrent state that only a commit is to write"),
    ],
)
def test_windows_that_cannot_be_left_are_refused(function: Callable[..., Any], reason: str) -> None:
    refused(function, inputs(3), window(), *weights(), reason=reason)


def no_state(tokens: Any, state: Tensor) -> Tensor:
    return torch.ops.specc.ssd(*tokens, None, True, 0.0, 1.0)[0]


def never_written(tokens: Any, state: Tensor) -> Tensor:
    return SSD(tokens, state)[0]


def written_twice(tokens: Any, state: Tensor) -> Tensor:
    out, final = SSD(tokens, state)
    state.copy_(final)
    state.copy_(final * 2)
    return out


def written_otherwise(tokens: Any, state: Tensor) -> Tensor:
    out, final = SSD(tokens, state)
    state.copy_(final * 2)
    return out


def final_read(tokens: Any, state: Tensor) -> Tensor:
    out, final = SSD(tokens, state)
    state.copy_(final)
    return out + final.sum()


def final_of_a_stand_in_read(tokens: Any, state: Tensor) -> Tensor:
    lens = torch.zeros(3, ROWS, dtype=torch.int64)
    stand_in = torch.ops.specc.recurrent_state(state, [state] * 3, *lens, EVERY, False)
    out, final = SSD(tokens, stand_in)
    return out + final.sum()


def stand_in_read(tokens: Any, state: Tensor) -> Tensor:
    lens = torch.zeros(3, ROWS, dtype=torch.int64)
    return torch.ops.specc.recurrent_state(state, [state], *lens, EVERY, False).sum()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_state, "starts from no cached state"),
        (never_written, "has its state written back 0 times"),
        (written_twice, "has its state written back 2 times"),
        (written_otherwise, "is not what copy_ writes back to its state"),
        (final_read, "has the state behind its block read by sum"),
        (final_of_a_stand_in_read, "has the state behind its block read by sum"),
        (stand_in_read, "reads a recurrent state as no recurrence does"),
    ],
)
def test_recurrences_that_cannot_be_left_are_refused(function: Callable[..., Any], reason: str) -> None:
    refused(function, SSD.tokens(3), SSD.pool()[0], reason=reason)


def refused(function: Callable[..., Any], *args: Any, reason: str) -> None:
    """The compile must end with ``reason`` and the line of this file that it is about."""

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        run_passes(gm, PASSES, PassContext(VERIFY))
        raise AssertionError("not refused")

    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed) as raised, torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    error = raised.value.inner_exception
    assert isinstance(error, UnsupportedError)
    assert reason in str(error)
    assert "test_state_commit.py:" in str(error) or "recurrent_graphs.py:" in str(error)


def test_a_stand_in_that_is_left_says_so_when_it_runs() -> None:
    state, lens = torch.zeros(ROWS, 4, 4), torch.zeros(3, ROWS, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="state_commit"):
        recurrent_state(state, [state], *lens, EVERY, False)


def test_the_stand_in_has_the_states_shape() -> None:
    lens = torch.zeros(3, ROWS, dtype=torch.int64, device="meta")
    state = torch.empty(5, 4, 6, dtype=torch.bfloat16, device="meta")
    assert recurrent_state(state, [state], *lens, EVERY, False).shape == (ROWS, 4, 6)
    kept = recurrent_state(state[:, :, None].expand(5, 4, 3, 6), [], *lens, EVERY, False)
    assert (kept.shape, kept.dtype) == ((ROWS, 3, 6), torch.float32)
