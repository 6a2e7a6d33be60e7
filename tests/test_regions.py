"""Layers that are alike share one compiled function, and the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import specc
from specc import pipeline, regions
from tests import recurrent
from tests.families import COMMON, prompt

AS_CAPTURED = {"inductor": False}
DEPTH = {**COMMON, "num_hidden_layers": 6}


def _varied(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.15)
    return model.eval()


def llama() -> Any:
    return _varied(LlamaForCausalLM(LlamaConfig(**DEPTH)))


def gemma3() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    own = {"sliding_window": 8, "layer_types": kinds, "head_dim": 16, "tie_word_embeddings": False}
    return _varied(Gemma3ForCausalLM(Gemma3TextConfig(**DEPTH, **own)))


def qwen3_5() -> Any:
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 2
    return recurrent.build("qwen3_5", num_hidden_layers=6, layer_types=kinds)


def mamba2() -> Any:
    return recurrent.build("mamba2", num_hidden_layers=5)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> list[tuple[int, int]]:
    """For each graph that was cut: how many pieces it has, and how many of them were compiled."""
    seen: list[tuple[int, int]] = []
    original = regions.compile_pieces

    def counted(gm: Any, pieces: Any, compile_one: Callable[..., Any]) -> Any:
        compiled: list[Any] = []

        def counting(*arguments: Any) -> Any:
            compiled.append(arguments)
            return compile_one(*arguments)

        result = original(gm, pieces, counting)
        seen.append((len(pieces), len(compiled)))
        return result

    monkeypatch.setattr(pipeline.regions, "compile_pieces", counted)
    return seen


# Prologue and head, and what layers come to: the first may settle sizes that others must not rely on.
@pytest.mark.parametrize(
    ("build", "pieces", "most"), [(llama, 8, 4), (gemma3, 8, 6), (qwen3_5, 8, 6), (mamba2, 7, 5)]
)
def test_tokens_are_the_same_and_layers_compiled_once(
    build: Callable[[], Any], pieces: int, most: int, shared: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    model = build()
    ids = prompt(2)["input_ids"] % model.config.vocab_size
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**given, max_new_tokens=32, do_sample=False)
    output = specc.generate(
        model,
        **given,
        draft=model,
        num_draft_tokens=3,
        max_new_tokens=32,
        do_sample=False,
        options=AS_CAPTURED,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    assert len(shared) >= 3, "prompts, drafts and blocks have a graph each"
    for count, compiled in shared:
        assert (count, compiled <= most) == (pieces, True), (count, compiled)


def test_inductors_code_is_shared_too(shared: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model, given = llama(), prompt(2)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    tokens = specc.generate(model, **given, draft="ngram", **settings)
    assert torch.equal(tokens, model.generate(**given, **settings))
    assert shared


def test_a_layer_that_is_different_has_code_of_its_own(shared: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model, given = llama(), prompt(2)
    model.model.layers[3].self_attn.scaling *= 1.9
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    tokens = specc.generate(model, **given, draft="ngram", options=AS_CAPTURED, **settings)
    assert torch.equal(tokens, model.generate(**given, **settings))
    assert [compiled for _, compiled in shared] == [5, 5]


def test_a_users_own_compile(shared: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model = llama()
    ids = torch.randint(3, COMMON["vocab_size"], (2, 6))
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    compiled = torch.compile(model, backend="specc", fullgraph=True, options=AS_CAPTURED)
    with torch.no_grad():
        for cache in caches:
            model(input_ids=ids, past_key_values=cache)
        expected = model(input_ids=ids, past_key_values=caches[0])
        got = compiled(input_ids=ids, past_key_values=caches[1])
    torch.testing.assert_close(got.logits, expected.logits)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
    assert shared[0][1] < shared[0][0]


def test_states_that_the_user_commits(shared: list[tuple[int, int]]) -> None:
    model = qwen3_5()
    options = {**AS_CAPTURED, "mode": "verify"}
    verify = torch.compile(model, backend="specc", fullgraph=True, dynamic=False, options=options)
    given, block = recurrent.prompt(2, 9), recurrent.prompt(2, 4, seed=5)
    caches = [recurrent.static_cache(model) for _ in range(2)]
    for cache in caches:
        recurrent.feed(model, cache, given, 0)
    recurrent.feed(model, caches[0], block, 9)
    recurrent.feed(verify, caches[1], block, 9)
    specc.commit(verify, torch.tensor([3, 3]))
    for one, other in zip(recurrent.states(caches[0]), recurrent.states(caches[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert shared


def test_a_model_without_layers_is_compiled_whole(shared: list[tuple[int, int]]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled = torch.compile(model, backend="specc", options=AS_CAPTURED)
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert not shared


def test_code_that_relies_on_a_size_is_not_shared() -> None:
    """Torch would guard the size of the piece that was compiled, and of no other."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    graph, pieces, relied = Graph(), [], []
    for name in ("x", "y"):
        node = graph.placeholder(name)
        node.meta["example_value"] = mode.from_tensor(torch.ones(7), symbolic_context=context)
        pieces.append(regions.Piece(GraphModule({}, Graph()), (node,), (), ("same",), (name,)))

    def compile_one(settles: bool) -> Callable[..., Any]:
        def compiling(_: Any, values: list[Any]) -> Any:
            if settles:
                relied.append(bool(values[0].shape[0] == 7))
            return lambda *arguments: ()

        return compiling

    assert len(set(regions._shared_code(pieces, compile_one(False)))) == 1
    assert len(set(regions._shared_code(pieces, compile_one(True)))) == 2
    assert relied == [True, True]
