"""The number that matters: tokens equal to plain decoding, float32, CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import specc
from specc.runtime import session
from tests.families import FAMILIES, noisy_copy, prompt, tiny

EXHAUSTIVE = pytest.mark.exhaustive
NEW_TOKENS = 64
WIDTH = 12


def plain(family: str, rows: int, **settings: Any) -> torch.Tensor:
    """What the model says by itself, row by row without padding, laid out as generate lays out batches."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return tiny(family).generate(**prompt(rows, WIDTH), **settings)


def draft_for(kind: str, family: str) -> Any:
    return {"ngram": "ngram", "itself": tiny(family), "assistant": noisy_copy(family)}[kind]


# The model's own attention over masks, or captured graphs with every pass on.
HOW: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "captured": {"compile": True, "options": {"inductor": False}},
}


def speculate(family: str, rows: int, draft: Any, how: str = "eager", **settings: Any) -> Any:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **HOW[how], **settings}
    return specc.generate(
        tiny(family), **prompt(rows, WIDTH), draft=draft, return_dict_in_generate=True, **settings
    )


# Graphs are compiled per family, rows and block: the suite takes one row of long blocks, four of short ones.
TABLE = [
    pytest.param(
        how, rows, count, marks=() if how == "eager" or (rows, count) in ((1, 8), (4, 4)) else EXHAUSTIVE
    )
    for how, rows, count in itertools.product(HOW, (1, 4), (2, 4, 8))
]


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
@pytest.mark.parametrize(("how", "rows", "num_draft_tokens"), TABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_decoding(
    how: str, family: str, rows: int, num_draft_tokens: int, kind: str
) -> None:
    output = speculate(family, rows, draft_for(kind, family), how, num_draft_tokens=num_draft_tokens)
    assert torch.equal(output.sequences, plain(family, rows))
    assert output.speculation.mean_accepted_length > 1, "no draft was ever accepted: nothing was tested"


@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_sensitive(family: str) -> None:
    """Equality proves something only if the text varies and depends on what the cache holds."""
    model, inputs = tiny(family), prompt(1, WIDTH)["input_ids"]
    assert plain(family, 4)[:, WIDTH:].unique().numel() >= 10
    with torch.no_grad():
        whole = model(inputs).logits[:, -1]
        forgetful = model(inputs[:, -1:], position_ids=torch.tensor([[WIDTH - 1]])).logits[:, -1]
    assert (whole - forgetful).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_their_unpadded_selves(family: str) -> None:
    inputs = prompt(4, WIDTH)
    together = speculate(family, 4, "ngram").sequences
    for row in range(4):
        alone = inputs["input_ids"][row : row + 1, 3 * row :]
        expected = tiny(family).generate(alone, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(together[row : row + 1, 3 * row :], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_drafting_for_itself_is_always_right(family: str) -> None:
    output = speculate(family, 4, tiny(family), num_draft_tokens=4, max_new_tokens=1 + 4 * 12)
    assert output.speculation.acceptance == [1.0, 1.0, 1.0]
    assert output.speculation.mean_accepted_length == 4.0
    assert torch.equal(output.sequences, plain(family, 4, max_new_tokens=1 + 4 * 12))


@pytest.mark.parametrize("place", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", HOW)
def test_eos_anywhere_in_an_accepted_block(how: str, family: str, place: int) -> None:
    """A model drafting for itself has whole blocks of 8 accepted, so EOS lies inside one."""
    text = plain(family, 1)[0, WIDTH:].tolist()
    eos = text[place]
    settings = {"eos_token_id": eos, "pad_token_id": 0}
    expected = plain(family, 1, **settings)
    output = speculate(family, 1, tiny(family), how, num_draft_tokens=8, **settings)
    assert torch.equal(output.sequences, expected)
    assert output.sequences[0, -1] == eos


@pytest.mark.parametrize("kind", ["ngram", "itself"])
def test_several_eos_ids_stop_ragged_rows(kind: str) -> None:
    text = plain("llama", 4)
    ids = [int(text[row, WIDTH + 5 + 7 * row]) for row in range(3)]
    settings = {"eos_token_id": ids, "pad_token_id": 0}
    output = speculate("llama", 4, draft_for(kind, "llama"), num_draft_tokens=8, **settings)
    assert torch.equal(output.sequences, plain("llama", 4, **settings))


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 8, 9, 10])
@pytest.mark.parametrize("kind", ["ngram", "itself"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", HOW)
def test_the_length_limit_inside_a_block(how: str, family: str, kind: str, max_new_tokens: int) -> None:
    draft = draft_for(kind, family)
    output = speculate(family, 4, draft, how, num_draft_tokens=8, max_new_tokens=max_new_tokens)
    assert torch.equal(output.sequences, plain(family, 4, max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("setting", ["min_new_tokens", "min_length"])
def test_minimum_lengths_keep_eos_back(setting: str) -> None:
    text = plain("llama", 4)
    eos = int(text[0, WIDTH + 3])
    settings = {"eos_token_id": eos, "pad_token_id": 0, setting: 20}
    output = speculate("llama", 4, tiny("llama"), num_draft_tokens=8, **settings)
    expected = plain("llama", 4, **settings)
    assert torch.equal(output.sequences, expected)
    assert not torch.equal(expected, plain("llama", 4, eos_token_id=eos, pad_token_id=0))


def test_the_first_token_is_eos() -> None:
    settings = {"eos_token_id": int(plain("llama", 1)[0, WIDTH]), "pad_token_id": 0}
    output = speculate("llama", 1, "ngram", **settings)
    assert torch.equal(output.sequences, plain("llama", 1, **settings))
    assert output.speculation.steps == 0


def test_one_token_blocks_are_plain_decoding() -> None:
    for kind in ("ngram", "assistant"):
        output = speculate("llama", 4, draft_for(kind, "llama"), num_draft_tokens=1)
        assert torch.equal(output.sequences, plain("llama", 4))
        assert output.speculation.mean_accepted_length == 1.0


def test_a_prompt_of_one_token() -> None:
    for draft in ("ngram", noisy_copy("llama")):
        ids = torch.tensor([[5]])
        settings = {"max_new_tokens": 20, "do_sample": False}
        tokens = specc.generate(tiny("llama"), ids, draft=draft, compile=False, **settings)
        assert torch.equal(tokens, tiny("llama").generate(ids, **settings))


@pytest.mark.parametrize("kind", ["ngram", "itself"])
@pytest.mark.parametrize("how", HOW)
def test_the_exact_end_of_the_context(how: str, kind: str) -> None:
    """The last blocks reach beyond the last position; nothing there may leak into what is committed."""
    context = tiny("llama").config.max_position_embeddings
    settings = {"max_new_tokens": context - WIDTH}
    output = speculate("llama", 1, draft_for(kind, "llama"), how, num_draft_tokens=8, **settings)
    assert output.sequences.shape[1] == context
    assert torch.equal(output.sequences, plain("llama", 1, **settings))


def test_learned_positions_end_where_the_context_ends() -> None:
    """A block that reaches beyond a learned position table must not index it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    settings = {"max_new_tokens": 32 - WIDTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = prompt(1, WIDTH)
    tokens = specc.generate(model, **inputs, draft=model, num_draft_tokens=8, compile=False, **settings)
    assert torch.equal(tokens, model.generate(**inputs, **settings))


def test_a_second_call_starts_afresh() -> None:
    first, second = (speculate("gemma3", 4, "ngram").sequences for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("how", HOW)
def test_exact_blocks_of_one_are_fed_as_blocks_of_two(how: str) -> None:
    """Kernels for one row round differently from those for more; the second token is ignored."""
    options = {"inductor": False, "exact": True}
    settings = {**HOW[how], "options": options, "num_draft_tokens": 1}
    output = specc.generate(
        tiny("llama"),
        **prompt(4, WIDTH),
        draft="ngram",
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    assert torch.equal(output.sequences, plain("llama", 4))
    assert output.speculation.mean_accepted_length == 1


def test_only_what_verifies_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft's last bits do not matter, and exact kernels cost."""
    exact: dict[str, tuple[bool | None, bool]] = {}
    made = session.BoundModel

    def noting(model: Any, role: Any, *, options: Any, plan: Any, **others: Any) -> Any:
        exact[role.name] = options.exact, plan.exact
        return made(model, role, options=options, plan=plan, **others)

    monkeypatch.setattr(session, "BoundModel", noting)
    output = speculate("llama", 4, noisy_copy("llama"), "eager", options={"exact": True})
    assert torch.equal(output.sequences, plain("llama", 4))
    assert exact == {"verify": (True, True), "draft": (False, False)}
