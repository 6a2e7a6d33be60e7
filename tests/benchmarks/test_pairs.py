"""Pairs whose agreement can be set, and the floors of their steps."""

from __future__ import annotations

import pytest
import torch
import transformers

from benchmarks.generation_floor import Floor, Multiplications, Reads, bound_seconds
from benchmarks.generation_gpt_fast import interleaved
from benchmarks.pairs import SHAPES, Pair, first_layers, random_text


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-hybrid"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param, "cpu", torch.float32)


class TestPair:
    def test_the_draft_has_no_tensor_of_its_own(self, pair: Pair) -> None:
        shared = {id(each) for each in [*pair.target.parameters(), *pair.target.buffers()]}
        assert all(id(each) in shared for each in [*pair.draft.parameters(), *pair.draft.buffers()])
        assert len(pair.draft.model.layers) == pair.draft_layers < len(pair.target.model.layers)

    def test_without_the_other_layers_both_are_one_function(self, pair: Pair) -> None:
        assert pair.agreement(0.0) == 1.0

    def test_agreement_falls_with_eps(self, pair: Pair) -> None:
        assert 1.0 > pair.agreement(0.1) > pair.agreement(1.0)

    def test_an_agreement_can_be_asked_for(self, pair: Pair) -> None:
        for wanted in (0.9, 0.5):
            eps = pair.set_agreement(wanted)
            assert pair.eps == eps
            assert pair.agreement(eps) == pytest.approx(wanted, abs=0.05)

    def test_the_seed_decides_the_weights(self, pair: Pair) -> None:
        pair.set_eps(0.3)
        again = Pair(pair.name, "cpu", torch.float32)
        again.set_eps(0.3)
        for ours, theirs in zip(pair.target.parameters(), again.target.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_rows_are_different_texts(self, pair: Pair) -> None:
        text = random_text(pair.target, 4, 8, seed=0)
        assert len({tuple(row) for row in text.tolist()}) == 4
        assert torch.equal(text, random_text(pair.target, 4, 8, seed=0))


def _reads(shape: str) -> tuple[Reads, Reads]:
    with torch.device("meta"):
        target = transformers.AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=torch.bfloat16)
    return Reads.of(target), Reads.of(first_layers(target, SHAPES[shape].draft_layers))


class TestFloor:
    def test_of_llama_8b(self) -> None:
        target, draft = _reads("llama-8b")
        assert target.weights / 1e9 == pytest.approx(15.01, abs=0.01)
        assert draft.weights / 1e9 == pytest.approx(1.92, abs=0.01)
        assert target.per_token == 128 * 1024
        assert target.state == 0

    def test_of_llama_1b_counts_the_tied_head(self) -> None:
        assert _reads("llama-1b")[0].weights / 1e9 == pytest.approx(2.47, abs=0.01)

    def test_of_a_hybrid(self) -> None:
        target, _ = _reads("qwen3.5-9b")
        assert target.per_token == 8 * 2 * 4 * 256 * 2
        # 24 layers of 32 heads of 128 x 128 in float32, and three inputs of 8192 channels.
        assert target.state == 24 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)

    def test_is_a_sum(self) -> None:
        target, draft = Reads(1000, 10, 5, 7, 500), Reads(100, 1, 2, 7, 50)
        floor = Floor.of(target, draft, batch=2, context=3, drafts=4, passes=5)
        assert floor == Floor(1000, 500, 2 * 3 * 15, 2 * 15, 2 * 5 * 7)
        assert floor.bytes == 1000 + 500 + 90 + 30 + 70

    # At 20 bytes a second: 164 of keys, values and logits, 200 of the target's weights and 80 of the draft's.
    @pytest.mark.parametrize(
        ("rate", "seconds"),
        [(1e9, (164 + 200 + 80) / 20), (100, 164 / 20 + 12 + 80 / 20), (10, 164 / 20 + 136)],
    )
    def test_products_bind_many_rows(self, rate: float, seconds: float) -> None:
        step = {"batch": 2, "drafts": 2, "passes": 2}
        models = Reads(200, 10, 0, 4, 100), Reads(40, 2, 0, 4, 20)
        floor, work = Floor.of(*models, context=5, **step), Multiplications.of(*models, **step)
        assert work == Multiplications(600, 80)
        assert bound_seconds(floor, work, 20, rate) == pytest.approx(seconds)


def test_gpt_fasts_rotary_embedding_gets_the_same_scores() -> None:
    """It rotates neighbours, transformers the halves; queries and keys are permuted alike."""
    heads, dim, tokens = 2, 8, 5
    weights = torch.randn(2, heads * dim, 16)
    x = torch.randn(tokens, 16)
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(dim // 2) * 2 / dim)
    cos, sin = angles.cos(), angles.sin()

    def halves(weight: torch.Tensor) -> torch.Tensor:
        first, second = (x @ weight.T).view(tokens, heads, 2, dim // 2).permute(1, 2, 0, 3).unbind(1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def neighbours(weight: torch.Tensor) -> torch.Tensor:
        first, second = (x @ interleaved(weight, heads).T).view(tokens, heads, dim // 2, 2).unbind(-1)
        first, second = first.transpose(0, 1), second.transpose(0, 1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)

    scores = [turn(weights[0]) @ turn(weights[1]).mT for turn in (halves, neighbours)]
    torch.testing.assert_close(*scores)
