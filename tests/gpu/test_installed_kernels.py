"""The real fla, where it is installed: what transformers takes from it is in no captured graph."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.test_recurrent import noisy, speculate, wide
from tests.runtime.test_recurrent_equality import inputs

pytest.importorskip("fla")


def in_use(function: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers calls where its model names ``function``."""
    while "implementation" not in function.__code__.co_freevars:
        function = function.__wrapped__  # type: ignore[attr-defined]
    found: Callable[..., Any] = inspect.getclosurevars(function).nonlocals["implementation"]
    return found


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_tokens_are_those_without_drafts(family: str, fresh_compiler: None) -> None:
    model = wide(family).cuda()
    theirs = in_use(sys.modules[type(model).__module__].torch_chunk_gated_delta_rule)
    assert theirs.__module__.startswith("fla."), "fla is not in use: nothing is tested"
    given = {name: value.cuda() for name, value in inputs(4).items()}
    plain = speculate(model, given, "ngram", num_draft_tokens=1)
    for draft in ("ngram", noisy(model)):
        output = speculate(model, given, draft)
        assert torch.equal(output.sequences, plain.sequences)
        assert output.speculation.graph_nodes or family == "qwen3_next"
    expected = model.generate(**given, max_new_tokens=64, do_sample=False)
    # fla sums in another order, and transformers' own float32 tokens need not be its.
    width = given["input_ids"].shape[1] + 8
    assert torch.equal(plain.sequences[:, :width], expected[:, :width])
