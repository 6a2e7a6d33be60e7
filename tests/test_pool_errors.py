"""Keys and values that do not fit into memory: one sentence, nothing generated, nothing left behind."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specc
from specc.errors import PoolError
from specc.runtime.cache import PagedCache
from tests.doors import DOORS, FULL_DOORS, SETTINGS, SPECC, Recorder, plain, through_function
from tests.families import noisy_copy, prompt, tiny

# Two layers of 2 heads of 8 float32 keys and as many values, in pages of 64 tokens.
PAGE_BYTES = 2 * 2 * (8 + 8) * 4 * 64


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[PagedCache]]:
    """Every pool that is begun, whether or not it is finished."""
    begun: list[weakref.ref[PagedCache]] = []
    init = PagedCache.__init__

    def recorded(self: PagedCache, *args: Any, **kwargs: Any) -> None:
        begun.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(PagedCache, "__init__", recorded)
    return begun


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets how many bytes are free, one number for each time that is asked."""

    def set_to(*values: int) -> None:
        left = iter(values)
        monkeypatch.setattr("specc.runtime.cache.free_bytes", lambda device: next(left))

    return set_to


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("pages", [0, 1, 4])
def test_the_missing_pages_are_named(door: Any, pages: int, free: Any) -> None:
    """Four rows of up to 12 + 40 + 8 tokens: a page each, and the one that belongs to none."""
    free(pages * PAGE_BYTES)
    message = f"needs 5 pages .* on cpu {5 - pages} of them are missing: generate fewer tokens"
    with pytest.raises(PoolError, match=message):
        door()


def test_what_just_fits_is_no_error(free: Any) -> None:
    free(5 * PAGE_BYTES)
    assert torch.equal(through_function(), plain())
    free(5 * PAGE_BYTES - 1)
    with pytest.raises(PoolError, match="needs 5 pages .* 1 of them are missing"):
        through_function()


def test_fp8_takes_a_quarter_of_float32(free: Any) -> None:
    free(5 * PAGE_BYTES // 4)
    assert through_function(kv_dtype="fp8").shape == plain().shape
    free(5 * PAGE_BYTES // 4 - 1)
    with pytest.raises(PoolError, match="1 of them are missing"):
        through_function(kv_dtype="fp8")


@pytest.mark.parametrize("door", FULL_DOORS)
def test_nothing_is_generated_or_streamed_and_the_next_call_works(
    door: Any, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_function(1)
    forwards: list[int] = []
    handle = tiny("llama").register_forward_pre_hook(lambda *_: forwards.append(1))
    streamer = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr("specc.runtime.cache.free_bytes", lambda device: 0)
        with pytest.raises(PoolError):
            door(streamer=streamer)
    handle.remove()
    assert (forwards, streamer.puts, streamer.ended) == ([], [], 0)
    assert torch.equal(door(), plain())


@pytest.mark.parametrize("compile", [False, True])
def test_pools_are_let_go_of(pools: list[weakref.ref[PagedCache]], compile: bool) -> None:
    settings = {"draft": noisy_copy("llama"), "compile": compile, "options": {"inductor": False}}
    for _ in range(2):
        through_function(2, **settings)
    gc.collect()
    assert len(pools) == 4
    assert [pool() for pool in pools] == [None] * 4


def test_a_pool_is_let_go_of_if_the_assistants_does_not_fit(
    pools: list[weakref.ref[PagedCache]], free: Any
) -> None:
    free(10**9, 0)
    with pytest.raises(PoolError):
        through_function(draft=noisy_copy("llama"))
    gc.collect()
    assert len(pools) == 2
    assert [pool() for pool in pools] == [None, None]


def test_memory_that_runs_out_while_pools_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device does not say what is free, the allocator does."""
    zeros, made = torch.zeros, []

    def scarce(*shape: Any, **kwargs: Any) -> torch.Tensor:
        if len(shape) == 4:
            if len(made) == 2:
                raise RuntimeError("out of memory")
            made.append(weakref.ref(zeros(*shape, **kwargs)))
        return zeros(*shape, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("specc.runtime.cache.torch.zeros", scarce)
        with pytest.raises(PoolError, match="needs 5 pages .* 3 of them are missing"):
            through_function()
    assert torch.equal(through_function(), plain())


def test_an_absurd_number_of_new_tokens(free: Any) -> None:
    free(2**30)
    with pytest.raises(PoolError, match="needs .* pages") as caught:
        specc.generate(tiny("llama"), **prompt(1), **SPECC, **{**SETTINGS, "max_new_tokens": 10**12})
    needed, missing = map(int, re.findall(r"(\d+) (?:pages|of them)", str(caught.value)))
    assert needed == -(-(12 + 10**12 + 8) // 64) + 1
    assert missing == needed - 2**30 // PAGE_BYTES
