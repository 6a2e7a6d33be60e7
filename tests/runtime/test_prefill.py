"""Reading prompts: in chunks, left-padded, once for equal rows, over pages and rings; tokens stay plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import specc
from specc.runtime.cache import PagedCache, PagedLayer
from tests.families import VOCAB, WINDOW, noisy_copy, tiny

NEW_TOKENS = 12
CHUNKS = [1, 3, 8]
SOME = ["llama", "gemma3", "gpt_oss", "deepseek_v3"]
SLIDING = ["gemma3", "gpt_oss"]
RAGGED = [26, 2, 17, 9]


def batch(lens: list[int], seed: int = 3) -> dict[str, torch.Tensor]:
    """Left-padded prompts of these lengths, each a word of five tokens over and over with an odd one out."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lens)
    ids = torch.zeros(len(lens), width, dtype=torch.int64)
    for row, length in enumerate(lens):
        text = torch.randint(3, VOCAB, (5,), generator=generator).repeat(length // 5 + 1)[:length]
        text[length // 2] = row + 3
        ids[row, width - length :] = text
    mask = (torch.arange(width) >= width - torch.tensor(lens)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def plain(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings})


def speculate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    defaults = {"draft": "ngram", "compile": False, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return specc.generate(model, **inputs, **{**defaults, **settings})


def lengths_around(chunk: int) -> list[int]:
    return sorted({1, 2, max(chunk - 1, 1), chunk, chunk + 1, 3 * chunk + 2})


@pytest.fixture
def fed() -> Iterator[Callable[[Any], list[torch.Size]]]:
    """Records the shape of what a model is fed."""
    handles = []

    def watch(model: Any) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        # So that the look at what its layers cache is not among them.
        speculate(model, batch([3]), max_new_tokens=1)
        handles.append(
            model.register_forward_pre_hook(
                lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
            )
        )
        return shapes

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[PagedLayer]:
    """The layers of every pool that is made."""
    made: list[PagedLayer] = []
    init = PagedCache.__init__

    def recorded(self: PagedCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.extend(self.layers.values())

    monkeypatch.setattr(PagedCache, "__init__", recorded)
    return made


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specc.runtime.model.PAGE_SIZE", 4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("family", SOME)
def test_prompts_of_every_length(family: str, chunk: int) -> None:
    for length in lengths_around(chunk):
        inputs = batch([length])
        tokens = speculate(tiny(family), inputs, prefill_chunk_size=chunk)
        assert torch.equal(tokens, plain(tiny(family), inputs)), length


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("family", SOME)
def test_padding_that_spans_chunks(family: str, chunk: int) -> None:
    """The assistant reads the prompts in the same chunks."""
    inputs = batch(RAGGED)
    expected = plain(tiny(family), inputs)
    for draft in ("ngram", noisy_copy(family)):
        assert torch.equal(speculate(tiny(family), inputs, draft=draft, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("family", SOME)
def test_references_are_sensitive_to_the_prompts_beginning(family: str) -> None:
    """Equality proves something only if the text varies and what the first chunk held matters for it."""
    model, inputs = tiny(family), batch([26])
    changed = inputs["input_ids"].clone()
    changed[:, :3] += 1
    with torch.no_grad():
        whole, other = model(inputs["input_ids"]).logits[:, -1], model(changed).logits[:, -1]
    assert (whole - other).abs().max() > 1e-3 * whole.abs().max()
    assert plain(model, batch(RAGGED))[:, 26:].unique().numel() >= 10


@pytest.mark.parametrize("family", SOME)
def test_captured_prompts_of_every_length(family: str, fresh_compiler: None) -> None:
    """One graph reads them all, in chunks of any size, into pools of any capacity."""
    model = tiny(family)
    captured = {"compile": True, "options": {"inductor": False}}
    stance = "default"
    calls = [(size, length, NEW_TOKENS) for size in CHUNKS for length in lengths_around(size)]
    for chunk, length, new_tokens in [(8, 9, NEW_TOKENS), *calls, (8, 26, 60), (512, 33, 90)]:
        inputs = batch([length])
        with torch.compiler.set_stance(stance):
            tokens = speculate(model, inputs, prefill_chunk_size=chunk, max_new_tokens=new_tokens, **captured)
        assert torch.equal(tokens, plain(model, inputs, max_new_tokens=new_tokens)), (chunk, length)
        stance = "fail_on_recompile"


@pytest.mark.parametrize("family", SOME)
def test_captured_ragged_batches(family: str, fresh_compiler: None) -> None:
    model, draft = tiny(family), noisy_copy(family) if family == "llama" else "ngram"
    captured = {"compile": True, "options": {"inductor": False}, "draft": draft}
    stance = "default"
    for chunk, lens in [(8, RAGGED), (3, [5, 21, 1, 3]), (1, [1, 2, 2, 1])]:
        inputs = batch(lens)
        with torch.compiler.set_stance(stance):
            tokens = speculate(model, inputs, prefill_chunk_size=chunk, **captured)
        assert torch.equal(tokens, plain(model, inputs)), chunk
        stance = "fail_on_recompile"


@pytest.mark.parametrize("chunk", [2, 3, 8, 30])
def test_a_prompt_is_fed_once_in_chunks(chunk: int, fed: Any) -> None:
    shapes = fed(tiny("llama"))
    speculate(tiny("llama"), batch(RAGGED), prefill_chunk_size=chunk, max_new_tokens=1)
    widths = [shape[1] for shape in shapes]
    assert {shape[0] for shape in shapes} == {4}
    assert sum(widths) == 26
    assert 2 <= max(widths) <= chunk
    assert len(widths) == -(-26 // chunk)


@pytest.mark.parametrize(("chunk", "length", "widths"), [(1, 1, [2]), (2, 5, [2, 2, 2]), (3, 4, [2, 2])])
def test_no_piece_of_a_prompt_is_a_single_token(chunk: int, length: int, widths: list[int], fed: Any) -> None:
    """A graph of dynamic length is none for a length of one: a column of padding is added instead."""
    shapes = fed(tiny("llama"))
    speculate(tiny("llama"), batch([length]), prefill_chunk_size=chunk, max_new_tokens=1)
    assert [shape[1] for shape in shapes] == widths


# Rows' prompts by number, and how many of them are different.
DUPLICATES = [([0, 0], 1), ([0, 1, 0, 2], 3), ([0, 1, 1, 0, 1], 2), ([0, 0, 0, 0], 1), ([0, 1, 2, 2], 3)]


@pytest.mark.parametrize(("chosen", "different"), DUPLICATES)
def test_equal_prompts_are_fed_once(chosen: list[int], different: int, fed: Any) -> None:
    inputs = {name: each[torch.tensor(chosen)] for name, each in batch([20, 7, 13]).items()}
    shapes = fed(tiny("llama"))
    tokens = speculate(tiny("llama"), inputs, prefill_chunk_size=8, max_new_tokens=1)
    assert sum(shape.numel() for shape in shapes) == different * 20
    assert torch.equal(tokens, plain(tiny("llama"), inputs, max_new_tokens=1))


@pytest.mark.parametrize(("chosen", "different"), DUPLICATES)
@pytest.mark.parametrize("family", SOME)
def test_equal_prompts_give_plain_tokens(
    family: str, chosen: list[int], different: int, small_pages: None, layers: list[PagedLayer]
) -> None:
    """Some equal rows stop early, by an EOS of their own, while others go on over the shared pages."""
    inputs = {name: each[torch.tensor(chosen)] for name, each in batch([20, 7, 13]).items()}
    expected = plain(tiny(family), inputs, max_new_tokens=30)
    for draft in ("ngram", noisy_copy(family)):
        tokens = speculate(tiny(family), inputs, draft=draft, prefill_chunk_size=8, max_new_tokens=30)
        assert torch.equal(tokens, expected)
    shared = [layer.keys.shape[0] for layer in layers if not layer.window]
    whole = 1 + len(chosen) * -(-(20 + 30 + 4) // 4)
    assert all(pages < whole for pages in shared), "nothing was shared"


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("draft", ["ngram", "assistant"])
def test_equal_prompts_that_end_around_a_page(draft: str, length: int, small_pages: None) -> None:
    inputs = {name: each[torch.tensor([0, 1, 0, 0])] for name, each in batch([length, 2]).items()}
    model = tiny("llama")
    tokens = speculate(model, inputs, draft=noisy_copy("llama") if draft == "assistant" else draft)
    assert torch.equal(tokens, plain(model, inputs))


def test_captured_equal_prompts(fresh_compiler: None) -> None:
    """Readers and rows are different numbers, so the prompts' graph and the blocks' differ in that."""
    model = tiny("gemma3")
    captured = {"compile": True, "options": {"inductor": False}}
    stance = "default"
    for chosen, lens in [([0, 1, 0, 1], [9, 6]), ([1, 1, 1, 0], [23, 30])]:
        inputs = {name: each[torch.tensor(chosen)] for name, each in batch(lens).items()}
        with torch.compiler.set_stance(stance):
            tokens = speculate(model, inputs, prefill_chunk_size=8, **captured)
        assert torch.equal(tokens, plain(model, inputs))
        stance = "fail_on_recompile"


@pytest.mark.parametrize("chunk", [2, 3, 13, 40])
@pytest.mark.parametrize("family", SLIDING)
def test_rings(family: str, chunk: int, small_pages: None, layers: list[PagedLayer]) -> None:
    """Prompts longer than window and chunk; text that goes round the rings; rows that do not fill theirs."""
    settings = {"max_new_tokens": 45, "num_draft_tokens": 8, "prefill_chunk_size": chunk}
    for lens in ([29], [37, 1, 18, 9]):
        inputs = batch(lens)
        expected = plain(tiny(family), inputs, max_new_tokens=45)
        for draft in ("ngram", noisy_copy(family)):
            tokens = speculate(tiny(family), inputs, draft=draft, **settings)
            assert torch.equal(tokens, expected)
    assert [layer.window for layer in layers[:2]] == [WINDOW, 0], "no ring was used"
    assert layers[0].keys.shape[0] < layers[1].keys.shape[0]


@pytest.mark.parametrize("family", SLIDING)
def test_a_short_row_that_does_not_fill_its_ring(
    family: str, small_pages: None, layers: list[PagedLayer]
) -> None:
    """Its neighbours' rings lie behind it in the pool, which has to be as large as all of them."""
    inputs = batch([2, 30, 30, 1])
    tokens = speculate(tiny(family), inputs, prefill_chunk_size=8, max_new_tokens=4)
    assert layers[0].window == WINDOW
    assert torch.equal(tokens, plain(tiny(family), inputs, max_new_tokens=4))


@pytest.mark.parametrize("family", SLIDING)
def test_equal_prompts_over_rings(family: str, small_pages: None, layers: list[PagedLayer]) -> None:
    inputs = {name: each[torch.tensor([1, 0, 0, 1, 0])] for name, each in batch([31, 22]).items()}
    tokens = speculate(tiny(family), inputs, prefill_chunk_size=5, max_new_tokens=40)
    assert layers[0].window == WINDOW
    assert torch.equal(tokens, plain(tiny(family), inputs, max_new_tokens=40))


@pytest.mark.parametrize("family", SLIDING)
def test_captured_rings(
    family: str, small_pages: None, layers: list[PagedLayer], fresh_compiler: None
) -> None:
    model, captured = tiny(family), {"compile": True, "options": {"inductor": False}}
    stance = "default"
    for length in (30, 43):
        inputs = batch([length, 11])
        with torch.compiler.set_stance(stance):
            tokens = speculate(model, inputs, prefill_chunk_size=5, max_new_tokens=40, **captured)
        assert torch.equal(tokens, plain(model, inputs, max_new_tokens=40))
        stance = "fail_on_recompile"
    assert layers[0].window == WINDOW


@pytest.mark.parametrize("family", SOME)
def test_sixteen_ragged_rows(family: str, small_pages: None) -> None:
    inputs = batch([1 + (7 * row) % 33 for row in range(16)])
    tokens = speculate(tiny(family), inputs, prefill_chunk_size=8, num_draft_tokens=8, max_new_tokens=20)
    assert torch.equal(tokens, plain(tiny(family), inputs, max_new_tokens=20))


def learned_positions() -> Any:
    """GPT-2 indexes a table of 32 positions: one beyond it is an error."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("draft", ["ngram", "itself"])
@pytest.mark.parametrize("make", [learned_positions, lambda: tiny("llama"), lambda: tiny("gemma3")])
def test_the_last_tokens_of_the_context(make: Any, draft: str, small_pages: None) -> None:
    """D = 8, and fewer tokens than that are left: blocks reach beyond the last position."""
    model = make()
    context = model.config.max_position_embeddings
    for left in range(1, 8):
        inputs = batch([context - left, 5])
        settings = {"max_new_tokens": left}
        tokens = speculate(
            model,
            inputs,
            draft=model if draft == "itself" else draft,
            num_draft_tokens=8,
            prefill_chunk_size=64,
            **settings,
        )
        assert tokens.shape[1] == context
        assert torch.equal(tokens, plain(model, inputs, **settings)), left
