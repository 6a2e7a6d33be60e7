"""The step's forwards are captured whole: one graph per family and role, compiled once, same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import specc
from specc.errors import CaptureError, CompileError
from specc.runtime.batch import Batch
from specc.runtime.forward import block_logits, next_draft
from specc.runtime.model import DRAFT, VERIFY, BoundModel
from specc.runtime.recurrent import RecurrentPlan
from tests.families import FAMILIES, noisy_copy, prompt, tiny

OPTIONS = specc.Options(inductor=False)


def bound(family: str, role: Any, q_len: int) -> BoundModel:
    """A model over prefilled, ragged rows."""
    inputs = prompt(4)
    batch = Batch.of(inputs["input_ids"], inputs["attention_mask"], 4)
    model = BoundModel(
        tiny(family),
        role,
        rows=batch.rows(52, idle_beyond=0),
        q_len=q_len,
        last_position=63,
        options=OPTIONS,
        compiled=False,
        plan=RecurrentPlan(ahead=q_len + 1),
    )
    with torch.no_grad():
        model.prefill(batch.prompts, batch.lens)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("role", "function", "q_len"), [(VERIFY, block_logits, 4), (DRAFT, next_draft, 2)])
def test_one_graph_per_family(
    family: str, role: Any, function: Any, q_len: int, fresh_compiler: None
) -> None:
    """Verify shape, ragged rows, a warm pool: one graph, no break, and the eager result."""
    model = bound(family, role, q_len)
    tokens = torch.randint(3, 100, (4, q_len))
    arguments = model._arguments(tokens)
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        expected = function(*arguments)
        captured = torch.compile(function, backend=counter, fullgraph=True)(*arguments)
    assert counter.frame_count == 1
    torch.testing.assert_close(captured, expected)
    (graph,) = (each.graph for each in counter.graphs)
    writes = graph.find_nodes(op="call_function", target=torch.ops.specc.kv_write.default)
    assert len(writes) == tiny(family).config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_give_plain_tokens(family: str, fresh_compiler: None) -> None:
    """Through backend="specc", and again without any recompile for a prompt of another length."""
    model, draft = tiny(family), noisy_copy(family)
    for width in (12, 17):
        inputs = prompt(2, width)
        settings = {"max_new_tokens": 24 + 5 * width, "do_sample": False}
        stance = "default" if width == 12 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            tokens = specc.generate(
                model, **inputs, draft=draft, num_draft_tokens=4, options=OPTIONS, **settings
            )
        assert torch.equal(tokens, model.generate(**inputs, **settings))


# Heads that share keys, sinks and windows, latent attention.
# torch 2.11's Inductor writes C++ that no compiler takes where it checks indices under a mask.
BROKEN = pytest.mark.xfail(
    torch.__version__.startswith("2.11"),
    reason="torch 2.11 writes wrong C++",
    raises=CompileError,
    strict=True,
)
MARKS = {
    "qwen3": (pytest.mark.exhaustive,),
    "gemma3": (pytest.mark.exhaustive,),
    "mixtral": (pytest.mark.exhaustive,),
    "deepseek_v3": (BROKEN,),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param(family, marks=MARKS.get(family, ())) for family in FAMILIES])
def test_through_inductor(family: str, fresh_compiler: None) -> None:
    model = tiny(family)
    settings = {"max_new_tokens": 64, "do_sample": False}
    tokens = specc.generate(model, **prompt(4), draft="ngram", options={"inductor": True}, **settings)
    assert torch.equal(tokens, model.generate(**prompt(4), **settings))


def test_compiled_forwards_are_kept_and_dropped_by_reset(fresh_compiler: None) -> None:
    def compile_seconds() -> float:
        output = specc.generate(
            tiny("llama"),
            **prompt(1),
            draft="ngram",
            options=OPTIONS,
            max_new_tokens=4,
            return_dict_in_generate=True,
        )
        return output.speculation.compile_seconds

    assert compile_seconds() > 0
    assert compile_seconds() == 0
    torch.compiler.reset()
    assert compile_seconds() > 0


def test_a_model_that_cannot_be_captured_names_the_line(fresh_compiler: None) -> None:
    model = FAMILIES["llama"]().eval()
    forward = model.model.norm.forward

    def breaks(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.sum() > 1e9:  # a branch on data
            return hidden
        return forward(hidden)

    model.model.norm.forward = breaks
    call = {
        "draft": "ngram",
        "options": OPTIONS,
        "max_new_tokens": 4,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with pytest.raises(CaptureError, match="test_capture.py:.*if hidden.sum.*compile=False"):
        specc.generate(model, **prompt(1), **call)
    tokens = specc.generate(model, **prompt(1), **call, compile=False)
    assert torch.equal(
        tokens, model.generate(**prompt(1), max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    )


def test_a_backend_failure_is_not_called_a_capture_failure(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("specc.pipeline.compat.inductor_compile", fails)
    options = {"inductor": True, "disable_passes": ["greedy_select"]}
    with pytest.raises(CompileError, match="RuntimeError: no such kernel.*'inductor': False"):
        specc.generate(tiny("qwen3"), **prompt(1), draft="ngram", options=options, max_new_tokens=4)
