"""Models with recurrent layers: tokens equal to plain decoding, float32, CPU, however states are kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import specc
from specc.errors import PoolError, SpeccError
from specc.runtime.batch import Batch
from specc.runtime.drafters.assistant import AssistantDrafter
from specc.runtime.model import VERIFY, BoundModel
from specc.runtime.recurrent import RecurrentLayer, RecurrentPlan
from specc.runtime.reports import StepReport, Tally
from tests.recurrent import FAMILIES, RELATIVES, build, feed, prompt, states, static_cache, tiny

NEW_TOKENS = 64
WIDTH = 12
LOWERINGS = ("replay", "snapshot")
# The model's own eager forward, or captured graphs.
HOW: dict[str, dict[str, Any]] = {"eager": {"compile": False}, "captured": {"compile": True}}


def inputs(rows: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of 12, 9, 6, 3 tokens, the last shorter than a convolution."""
    ids = prompt(rows, WIDTH)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@functools.cache
def plain(family: str, rows: int, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Each row by itself, without padding, laid out as generate lays out batches."""
    given = inputs(rows)
    out = torch.zeros(rows, WIDTH + new_tokens, dtype=torch.int64)
    out[:, :WIDTH] = given["input_ids"]
    for row in range(rows):
        alone = given["input_ids"][row : row + 1, 3 * row :]
        made = tiny(family).generate(alone, max_new_tokens=new_tokens, do_sample=False)
        out[row, WIDTH:] = made[0, alone.shape[1] :]
    return out


@functools.cache
def noisy_copy(family: str) -> Any:
    """An assistant that agrees with the model now and then."""
    model = build(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    return model


def draft_for(kind: str, family: str) -> Any:
    return {"ngram": "ngram", "itself": tiny(family), "assistant": noisy_copy(family)}[kind]


def speculate(family: str, rows: int, kind: str, lowering: str, how: str = "eager", **settings: Any) -> Any:
    options = {"inductor": False, "state_commit": lowering}
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "options": options, **HOW[how], **settings}
    return specc.generate(
        tiny(family), **inputs(rows), draft=draft_for(kind, family), return_dict_in_generate=True, **settings
    )


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
@pytest.mark.parametrize("num_draft_tokens", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_decoding(
    family: str, lowering: str, rows: int, num_draft_tokens: int, kind: str
) -> None:
    output = speculate(family, rows, kind, lowering, num_draft_tokens=num_draft_tokens)
    assert torch.equal(output.sequences, plain(family, rows))
    if kind == "assistant":
        assert output.speculation.mean_accepted_length > 1.2, (
            "hardly a draft was accepted: nothing was tested"
        )


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_tokens_equal_plain_decoding(family: str, lowering: str, kind: str) -> None:
    output = speculate(family, 4, kind, lowering, "captured", num_draft_tokens=4)
    assert torch.equal(output.sequences, plain(family, 4))
    if kind == "assistant":
        assert output.speculation.mean_accepted_length > 1.2, (
            "hardly a draft was accepted: nothing was tested"
        )


@pytest.mark.exhaustive
def test_inductors_kernels_give_plain_tokens(fresh_compiler: None) -> None:
    output = speculate("qwen3_5", 4, "ngram", "replay", options={}, compile=True, num_draft_tokens=4)
    assert torch.equal(output.sequences, plain("qwen3_5", 4))


@pytest.mark.parametrize("chunk", [2, 5])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "lfm2"])
def test_chunks_shorter_than_the_padding(family: str, lowering: str, chunk: int) -> None:
    """Of rows that share a prompt, which is read once, beside rows of other lengths."""
    order = torch.tensor([0, 3, 3, 1])
    given = {name: each[order] for name, each in inputs(4).items()}
    tokens = specc.generate(
        tiny(family),
        **given,
        draft=noisy_copy(family),
        prefill_chunk_size=chunk,
        max_new_tokens=20,
        do_sample=False,
        options={"inductor": False, "state_commit": lowering},
        compile=False,
    )
    assert torch.equal(tokens, plain(family, 4, 20)[order])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("target", "draft"), [("qwen3_5", "lfm2"), ("mamba2", "falcon_h1"), ("lfm2", "mamba2")]
)
def test_drafts_of_another_family(target: str, draft: str, lowering: str) -> None:
    tokens = specc.generate(
        tiny(target),
        **inputs(4),
        draft=tiny(draft),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        options={"inductor": False, "state_commit": lowering},
        compile=False,
    )
    assert torch.equal(tokens, plain(target, 4))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", RELATIVES)
def test_relatives_give_plain_tokens(family: str, lowering: str) -> None:
    how = "captured" if lowering == "replay" else "eager"
    output = speculate(family, 4, "assistant", lowering, how, num_draft_tokens=4)
    assert torch.equal(output.sequences, plain(family, 4))
    assert output.speculation.mean_accepted_length > 1.2


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["ngram", "assistant"])
@pytest.mark.parametrize("num_draft_tokens", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_tokens_equal_plain_decoding_at_every_size(
    family: str, lowering: str, rows: int, num_draft_tokens: int, kind: str
) -> None:
    output = speculate(family, rows, kind, lowering, "captured", num_draft_tokens=num_draft_tokens)
    assert torch.equal(output.sequences, plain(family, rows))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_drafting_for_itself_is_always_right(family: str, lowering: str) -> None:
    output = speculate(family, 4, "itself", lowering, num_draft_tokens=4, max_new_tokens=1 + 4 * 12)
    assert output.speculation.acceptance == [1.0, 1.0, 1.0]
    assert torch.equal(output.sequences, plain(family, 4, 1 + 4 * 12))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_forgets_rejected_drafts(
    family: str, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draft of a block is spoilt on its way to the target: all before it, and none else, are right."""
    propose, count = AssistantDrafter.propose, Tally.count
    spoilt: list[int] = []
    found: list[list[int]] = []

    def spoiling(self: AssistantDrafter, state: Any) -> torch.Tensor:
        drafts = propose(self, state)
        spoilt.append([1, 0, 3, 2, 0, 0, 1][len(spoilt) % 7])
        drafts[:, spoilt[-1] : spoilt[-1] + 1] ^= 1
        return drafts

    def counting(self: Tally, report: StepReport) -> None:
        found.append(report.num_correct)
        count(self, report)

    monkeypatch.setattr(AssistantDrafter, "propose", spoiling)
    monkeypatch.setattr(Tally, "count", counting)
    output = speculate(family, 4, "itself", lowering, num_draft_tokens=4)
    assert torch.equal(output.sequences, plain(family, 4))
    assert found[:-1] == [[right] * 4 for right in spoilt[:-1]]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("family", "how"), [("qwen3_5", "eager"), ("mamba2", "eager"), ("lfm2", "eager"), ("mamba2", "captured")]
)
def test_one_token_prompts_one_row_and_short_chunks(family: str, how: str, lowering: str) -> None:
    """One row whose chunks begin with padding, which a convolution's bias must not turn into tokens."""
    model = tiny(family)
    for width in (1, 2, 7):
        ids = prompt(1, width)
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
        for draft in ("ngram", model):
            out = specc.generate(
                model,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                draft=draft,
                num_draft_tokens=4,
                prefill_chunk_size=3,
                options={"state_commit": lowering, "inductor": False},
                **HOW[how],
                max_new_tokens=20,
                do_sample=False,
            )
            assert torch.equal(out, expected), (width, draft)


@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_sensitive(family: str) -> None:
    """Equality proves something only if the text varies and depends on the recurrent state."""
    assert plain(family, 4)[:, WIDTH:].unique().numel() >= 10
    model, ids = tiny(family), prompt(1, WIDTH)
    moved = []
    for forget in (False, True):
        cache = static_cache(model)
        feed(model, cache, ids, 0)
        if forget:
            for state in states(cache):
                state.zero_()
        moved.append(feed(model, cache, ids[:, :1], WIDTH))
    assert (moved[0] - moved[1]).abs().max() > 1e-3 * moved[0].abs().max()


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", ["olmo_hybrid", "mamba2"])
def test_bfloat16_states_round_at_the_same_tokens_whatever_the_blocks(
    family: str, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding happens where checkpoints move, which depends on positions alone, or after each token."""
    kept: list[Any] = []
    spread = RecurrentLayer.spread
    monkeypatch.setattr(
        RecurrentLayer, "spread", lambda self, *args: (spread(self, *args), kept.append(self.state.dtype))
    )
    runs = [
        speculate(
            family, 4, kind, lowering, num_draft_tokens=count, state_dtype="bf16", max_new_tokens=150
        ).sequences
        for kind, count in (("ngram", 1), ("ngram", 3), ("assistant", 4), ("assistant", 8))
    ]
    assert set(kept) == {torch.bfloat16}
    for other in runs[1:]:
        assert torch.equal(other, runs[0])


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_other_prompts_and_later_calls_compile_nothing_new(family: str, fresh_compiler: None) -> None:
    def run(width: int) -> torch.Tensor:
        ids = prompt(2, width, seed=width)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = {"max_new_tokens": 20, "do_sample": False}
        tokens = specc.generate(
            tiny(family), **given, draft=noisy_copy(family), options={"inductor": False}, **settings
        )
        assert torch.equal(tokens, tiny(family).generate(**given, **settings))
        return tokens

    run(9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for width in (5, 14, 30):
            run(width)


def test_without_its_pass_a_recurrence_is_an_error_and_no_wrong_tokens(fresh_compiler: None) -> None:
    left_out = {"disable_passes": ["state_commit"], "inductor": False}
    with pytest.raises(SpeccError, match="state_commit"):
        speculate("qwen3_5", 2, "ngram", "replay", "captured", options=left_out)


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "lfm2"])
def test_a_block_longer_than_the_pools_are_for_is_refused(family: str) -> None:
    given = inputs(1)
    batch = Batch.of(given["input_ids"], given["attention_mask"], 1)
    model = BoundModel(
        tiny(family),
        VERIFY,
        rows=batch.rows(20, idle_beyond=0),
        q_len=4,
        last_position=40,
        options=specc.Options(),
        compiled=False,
        plan=RecurrentPlan(ahead=3),
    )
    with torch.no_grad():
        model.prefill(batch.prompts, batch.lens)
        with pytest.raises(PoolError, match="a block of 4 tokens, where recurrent layers have room for 3"):
            model(torch.ones(1, 4, dtype=torch.int64))
