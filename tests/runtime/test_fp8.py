"""float8 pools: other tokens than plain decoding's, but the same ones however they are speculated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specc
from specc.runtime.cache import PagedCache
from tests.families import noisy_copy, prompt, tiny

SETTINGS: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False}


def through_fp8(family: str, draft: Any, num_draft_tokens: int, **settings: Any) -> Any:
    return specc.generate(
        tiny(family),
        **prompt(4),
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        **{
            "kv_dtype": "fp8",
            "return_dict_in_generate": True,
            "prefill_chunk_size": 5,
            **SETTINGS,
            **settings,
        },
    )


@pytest.mark.parametrize(
    ("family", "compile"),
    [("llama", False), ("gemma3", False), ("deepseek_v3", False), ("llama", True), ("gemma3", True)],
)
def test_speculation_does_not_change_tokens(family: str, compile: bool, fresh_compiler: None) -> None:
    how = {"compile": compile, "options": {"inductor": False}}
    expected = through_fp8(family, "ngram", 1, compile=False).sequences
    for draft in ("ngram", noisy_copy(family)):
        output = through_fp8(family, draft, 4, **how)
        assert torch.equal(output.sequences, expected)
        assert output.speculation.mean_accepted_length > 1, "no draft was ever accepted"


def test_the_pools_of_model_and_assistant_are_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so hold something else than what the model computed, which its tokens show."""
    dtypes: list[torch.dtype] = []
    init = PagedCache.__init__

    def recorded(self: PagedCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        dtypes.extend(pages.dtype for layer in self.layers.values() for pages in layer.pools)

    monkeypatch.setattr(PagedCache, "__init__", recorded)
    draft = noisy_copy("llama")
    rounded = through_fp8("llama", draft, 4, compile=False).sequences
    assert dtypes == [torch.float8_e4m3fn] * 8
    dtypes.clear()
    exact = through_fp8("llama", draft, 4, compile=False, kv_dtype=None).sequences
    assert dtypes == [torch.float32] * 8
    assert not torch.equal(rounded, exact)
    assert torch.equal(exact, tiny("llama").generate(**prompt(4), **SETTINGS))


def test_attach_keeps_the_pools_dtype() -> None:
    expected = through_fp8("llama", "ngram", 4, compile=False, prefill_chunk_size=None).sequences
    model = specc.attach(tiny("llama"), draft="ngram", kv_dtype="fp8", compile=False)
    try:
        assert torch.equal(model.generate(**prompt(4), **SETTINGS), expected)
        one_call = model.generate(**prompt(4), **SETTINGS, kv_dtype=None)
    finally:
        specc.detach(model)
    assert torch.equal(one_call, model.generate(**prompt(4), **SETTINGS))
    assert not torch.equal(one_call, expected)
