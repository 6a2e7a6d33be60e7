"""The plain door: a verify call of a compiled model leaves states alone, specc.commit moves them on."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import specc
from specc.errors import InputError
from tests.recurrent import FAMILIES, build, cache_name, feed, prompt, states, static_cache, tiny

ROWS, READ, BLOCK = 3, 9, 4
# Last correct steps of the rows: the same in all, then each of -1 .. 3 beside others.
COMMITS = [(0, 0, 0), (3, 3, 3), (-1, 0, 1), (2, 3, -1)]


def verify(model: Any, **options: Any) -> Any:
    given = {"mode": "verify", "inductor": False, **options}
    return torch.compile(model, backend="specc", fullgraph=True, dynamic=False, options=given)


def read(model: Any, rows: int = ROWS) -> Any:
    """A static cache that has read the prompt, eagerly."""
    cache = static_cache(model)
    feed(model, cache, prompt(rows, READ), 0)
    return cache


def block(tokens: int = BLOCK) -> Tensor:
    return prompt(ROWS, tokens, seed=5)


def next_logits(model: Any, cache: Any, kept: Tensor) -> Tensor:
    """Logits [B, V] of one more token behind READ + ``kept[b]`` tokens, eagerly.

    A mask hides what keys and values hold of the other tokens: their cache has one length for all rows.
    """
    ids = prompt(ROWS, 1, seed=11)
    if model.config.model_type == "mamba2":
        return feed(model, cache, ids, 0)[:, -1]
    mask = torch.arange(READ + BLOCK + 1) < READ + kept[:, None]
    mask[:, -1] = True
    given = {cache_name(model): cache, "attention_mask": mask.long(), "position_ids": READ + kept[:, None]}
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **given).logits[:, -1]


@functools.cache
def by_tokens(family: str) -> tuple[Tensor, list[Tensor]]:
    """Eager, token by token: the block's logits, and the next token's behind 0 ... BLOCK of its tokens."""
    model = tiny(family)
    cache, logits, behind = read(model), [], []
    for token in range(BLOCK + 1):
        ended = copy.deepcopy(cache)
        behind.append(feed(model, ended, prompt(ROWS, 1, seed=11), READ + token)[:, -1])
        if token < BLOCK:
            logits.append(feed(model, cache, block()[:, token : token + 1], READ + token))
    return torch.cat(logits, 1), behind


def close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def check_commits(family: str, commits: list[tuple[int, ...]], **options: Any) -> None:
    model = tiny(family)
    logits, behind = by_tokens(family)
    torch.compiler.reset()
    counters.clear()
    compiled = verify(model, **options)
    for last in commits:
        cache = read(model)
        before = [state.clone() for state in states(cache)]
        close(feed(model, cache, block(), READ, compiled), logits)
        assert all(map(torch.equal, states(cache), before)), "a verify call changes no state"
        specc.commit(compiled, torch.tensor(last))
        kept = torch.tensor(last) + 1
        expected = torch.stack([behind[count][row] for row, count in enumerate(kept.tolist())])
        close(next_logits(model, cache, kept), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_states_matter(family: str) -> None:
    """Without this, equal logits would say nothing about states."""
    model = tiny(family)
    cache, forgetful = read(model), read(model)
    for state in states(forgetful):
        state.zero_()
    logits, other = (feed(model, each, block(), READ) for each in (cache, forgetful))
    assert float((logits - other).abs().max() / logits.abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_next_logits_are_those_of_token_by_token(family: str) -> None:
    check_commits(family, COMMITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_snapshots_lead_to_the_same(family: str) -> None:
    check_commits(family, COMMITS[-2:], state_commit="snapshot")


def test_through_inductor() -> None:
    check_commits("mamba2", COMMITS[-1:], inductor=True)


# --- what is committed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """A model with a convolution and a recurrence in each layer, and its compiled form."""
    model = tiny("mamba2")
    return model, verify(model)


def test_a_verify_call_may_be_thrown_away(small: tuple[Any, Any]) -> None:
    model, compiled = small
    cache = read(model)
    before = [state.clone() for state in states(cache)]
    for seed in (5, 6, 5):
        logits = feed(model, cache, prompt(ROWS, BLOCK, seed=seed), READ, compiled)
    assert all(map(torch.equal, states(cache), before))
    close(logits, by_tokens("mamba2")[0])
    specc.commit(compiled, torch.tensor([1, 1, 1]))
    close(next_logits(model, cache, torch.full((ROWS,), 2)), by_tokens("mamba2")[1][2])


def test_blocks_follow_each_other(small: tuple[Any, Any]) -> None:
    model, _ = small
    compiled = torch.compile(
        model, backend="specc", fullgraph=True, options={"mode": "verify", "inductor": False}
    )
    cache, whole = read(model), read(model)
    ids = prompt(ROWS, 14, seed=8)
    expected = torch.cat([feed(model, whole, ids[:, i : i + 1], READ + i) for i in range(14)], 1)
    start = 0
    for length, accepted in ((4, 2), (1, 1), (6, 6), (3, 0), (5, 5)):
        logits = feed(model, cache, ids[:, start : start + length], READ + start, compiled)
        close(logits, expected[:, start : start + length])
        specc.commit(compiled, torch.full((ROWS,), accepted - 1, dtype=torch.int32))
        start += accepted
    assert start == 14


@pytest.mark.parametrize(
    ("family", "state_commit"), [("qwen3_5", "replay"), ("mamba2", "replay"), ("mamba2", "snapshot")]
)
def test_a_state_on_the_way_goes_to_a_spare_row(family: str, state_commit: str) -> None:
    model = tiny(family)
    torch.compiler.reset()
    compiled = verify(model, state_commit=state_commit)
    cache, other = read(model), read(model)
    for each in (other, cache):
        feed(model, each, block(), READ, compiled)
        if each is other:
            specc.commit(compiled, torch.tensor([1, 1, 1]))
    specc.commit(
        compiled,
        torch.tensor([3, 2, -1]),
        mamba_track_indices=torch.tensor([2, -1, -1]),
        mamba_steps_to_track=torch.tensor([1, 1, -1]),
    )
    for state, on_the_way in zip(states(cache), states(other), strict=True):
        torch.testing.assert_close(state[2], on_the_way[0])


def test_states_of_half_precision_keep_their_type() -> None:
    model = build("qwen3_5").to(torch.bfloat16)
    torch.compiler.reset()
    compiled = verify(model)
    cache, stepped = read(model), read(model)
    feed(model, cache, block(), READ, compiled)
    specc.commit(compiled, torch.tensor([1, 1, 1]))
    for token in range(2):
        feed(model, stepped, block()[:, token : token + 1], READ + token)
    for state, expected in zip(states(cache), states(stepped), strict=True):
        assert state.dtype == expected.dtype
        torch.testing.assert_close(state, expected, atol=0.05 * float(expected.abs().max()), rtol=0)


# --- which call is committed -------------------------------------------------------------------


def by_module(model: Any) -> tuple[Callable[..., Any], Any]:
    compiled = verify(model)
    return compiled, compiled


def by_forward(model: Any) -> tuple[Callable[..., Any], Any]:
    model.forward = verify(model.forward)
    return model, model


def by_compiled_forward(model: Any) -> tuple[Callable[..., Any], Any]:
    model.forward = verify(model.forward)
    return model, model.forward


def in_place(model: Any) -> tuple[Callable[..., Any], Any]:
    model.compile(backend="specc", fullgraph=True, options={"mode": "verify", "inductor": False})
    return model, model


def by_function(model: Any) -> tuple[Callable[..., Any], Any]:
    compiled = verify(lambda **given: model(**given))
    return compiled, compiled


def test_states_made_in_inference_mode(small: tuple[Any, Any]) -> None:
    model, compiled = small
    with torch.inference_mode():
        cache = read(model)
        feed(model, cache, block(), READ, compiled)
    specc.commit(compiled, torch.tensor([1, 1, 1]))
    with torch.inference_mode():
        close(next_logits(model, cache, torch.full((ROWS,), 2)), by_tokens("mamba2")[1][2])


@pytest.mark.parametrize("way", [by_module, by_forward, by_compiled_forward, in_place, by_function])
def test_ways_to_compile(way: Callable[[Any], tuple[Callable[..., Any], Any]]) -> None:
    torch.compiler.reset()
    model = build("mamba2")
    call, compiled = way(model)
    cache = static_cache(tiny("mamba2"))
    feed(tiny("mamba2"), cache, prompt(ROWS, READ), 0)
    feed(model, cache, block(), READ, call)
    specc.commit(compiled, torch.tensor([2, 2, 2]))
    close(next_logits(tiny("mamba2"), cache, torch.full((ROWS,), 3)), by_tokens("mamba2")[1][3])


@pytest.mark.parametrize("as_function", [False, True])
def test_all_graphs_of_a_broken_capture(as_function: bool) -> None:
    torch.compiler.reset()
    counters.clear()
    model = build("mamba2")
    model.backbone.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    target = (lambda **given: model(**given)) if as_function else model
    compiled = torch.compile(target, backend="specc", options={"mode": "verify", "inductor": False})
    cache = read(tiny("mamba2"))
    feed(model, cache, block(), READ, compiled)
    assert counters["stats"]["unique_graphs"] > 1
    specc.commit(compiled, torch.tensor([1, 1, 1]))
    close(next_logits(tiny("mamba2"), cache, torch.full((ROWS,), 2)), by_tokens("mamba2")[1][2])


def test_models_imported_after_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.lfm2 import modeling_lfm2

    torch.compiler.reset()
    model = tiny("lfm2")
    unrouted = inspect.unwrap(
        modeling_lfm2.causal_conv1d_fn, stop=lambda each: not hasattr(each, "specc_leaf")
    )
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", unrouted)
    compiled = verify(model)
    feed(model, read(model), block(), READ, compiled)
    specc.commit(compiled, torch.tensor([1, 1, 1]))


def test_models_keep_their_own_calls(small: tuple[Any, Any]) -> None:
    model, compiled = small
    other = build("mamba2", seed=1)
    compiled_other = verify(other)
    cache, cache_other = read(model), read(other)
    feed(model, cache, block(), READ, compiled)
    feed(other, cache_other, block(), READ, compiled_other)
    specc.commit(compiled, torch.tensor([0, 0, 0]))
    specc.commit(compiled_other, torch.tensor([-1, -1, -1]))
    close(next_logits(model, cache, torch.ones(ROWS, dtype=torch.int64)), by_tokens("mamba2")[1][1])
    assert all(map(torch.equal, states(cache_other), states(read(other))))


# --- what is refused ---------------------------------------------------------------------------


def test_without_a_verify_call(small: tuple[Any, Any]) -> None:
    model, compiled = small
    feed(model, read(model), block(), READ, compiled)
    raised: list[BaseException] = []

    def elsewhere() -> None:
        for each in (compiled, lambda: None):
            with pytest.raises(
                InputError, match="found no verify call of this thread: call the model"
            ) as error:
                specc.commit(each, torch.tensor([0, 0, 0]))
            raised.append(error.value)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(raised) == 2
    with pytest.raises(InputError, match="found no verify call"):
        specc.commit(build("lfm2"), torch.tensor([0, 0, 0]))


def test_a_call_is_committed_once(small: tuple[Any, Any]) -> None:
    model, compiled = small
    feed(model, read(model), block(), READ, compiled)
    specc.commit(compiled, torch.tensor([0, 0, 0]))
    for each in (compiled, model, lambda: None):
        with pytest.raises(InputError, match="is committed already: call the model"):
            specc.commit(each, torch.tensor([0, 0, 0]))


BAD: dict[str, tuple[Any, str]] = {
    "shape": (torch.tensor([0, 0]), r"shape \[3\] on cpu, not torch.int64 \[2\]"),
    "columns": (torch.zeros(ROWS, 1, dtype=torch.int64), r"not torch.int64 \[3, 1\]"),
    "dtype": (torch.zeros(ROWS), "not torch.float32"),
    "bool": (torch.zeros(ROWS, dtype=torch.bool), "not torch.bool"),
    "device": (torch.zeros(ROWS, dtype=torch.int64, device="meta"), "on meta"),
    "list": ([0, 0, 0], "not list"),
    "beyond": (torch.tensor([0, BLOCK, 0]), r"must lie in -1 \.\. 3, and is \[0, 4, 0\]"),
    "below": (torch.tensor([0, -2, 0]), "must lie in -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_steps_that_do_not_fit_change_nothing(small: tuple[Any, Any], case: str) -> None:
    model, compiled = small
    cache = read(model)
    before = [state.clone() for state in states(cache)]
    feed(model, cache, block(), READ, compiled)
    given, message = BAD[case]
    with pytest.raises(InputError, match=message):
        specc.commit(compiled, given)
    assert all(map(torch.equal, states(cache), before))
    specc.commit(compiled, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize(
    ("tracks", "message"),
    [
        ({"mamba_track_indices": torch.tensor([2, -1, -1])}, "both or not at all"),
        ({"mamba_steps_to_track": torch.tensor([2, -1, -1])}, "both or not at all"),
        (
            {
                "mamba_track_indices": torch.tensor([1, -1, -1]),
                "mamba_steps_to_track": torch.tensor([0, 0, 0]),
            },
            "must name rows whose last_correct_step_indices are -1",
        ),
        (
            {
                "mamba_track_indices": torch.tensor([3, -1, -1]),
                "mamba_steps_to_track": torch.tensor([0, 0, 0]),
            },
            r"mamba_track_indices must lie in -1 \.\. 2",
        ),
        (
            {
                "mamba_track_indices": torch.tensor([2, -1, -1]),
                "mamba_steps_to_track": torch.tensor([4, 0, 0]),
            },
            r"mamba_steps_to_track must lie in -1 \.\. 3",
        ),
    ],
)
def test_tracks_that_do_not_fit(small: tuple[Any, Any], tracks: dict[str, Tensor], message: str) -> None:
    model, compiled = small
    feed(model, read(model), block(), READ, compiled)
    with pytest.raises(InputError, match=message):
        specc.commit(compiled, torch.tensor([0, 0, -1]), **tracks)
