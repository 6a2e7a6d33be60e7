"""``specc bench``: what it measures, on a tiny model, and how it adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specc import bench
from specc.errors import InputError
from tests.families import VOCAB, noisy_copy, prompt, tiny
from tests.recurrent import VOCAB as RECURRENT_VOCAB
from tests.recurrent import tiny as tiny_recurrent

NEW_TOKENS = 16
UNCOMPILED = {"inductor": False}


def task(model: Any, **settings: Any) -> bench.Task:
    known: dict[str, Any] = {
        "name": "tiny",
        "model": model,
        "inputs": prompt(1),
        "draft": "ngram",
        "blocks": [3],
        "max_new_tokens": NEW_TOKENS,
        "repeats": 2,
        "options": UNCOMPILED,
    }
    return bench.Task(**{**known, **settings})


class TestSteps:
    def test_from_what_each_step_gave(self) -> None:
        steps = bench.Steps.of([3, 1, 2, 3], num_drafts=2)
        assert steps.count == 4
        assert steps.mean_accepted_length == 9 / 4
        assert steps.acceptance == (3 / 4, 2 / 4)

    def test_of_an_assistant_are_those_of_specc(self) -> None:
        model, draft = tiny("llama"), noisy_copy("llama")
        theirs = bench.hf_assisted(model, prompt(1), draft, 3, "assisted")
        ours = bench.by_specc(
            model, prompt(1), "specc", draft=draft, num_draft_tokens=4, compile=False
        ).prepare()(NEW_TOKENS)
        assert theirs.count_steps is not None
        assert ours.steps is not None
        # Hugging Face's first forward reads the prompt and the first drafts at once.
        assert theirs.count_steps(NEW_TOKENS).count == pytest.approx(ours.steps.count, abs=1)
        assert draft.generation_config.num_assistant_tokens != 3


class TestMeasure:
    def test_decoding_is_what_comes_after_the_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1000))
        now = 0.0

        def tick() -> float:
            next(clock)
            return now

        def call(new_tokens: int) -> bench.Outcome:
            nonlocal now
            now += 5.0 + new_tokens
            return bench.Outcome(torch.zeros(2, new_tokens, dtype=torch.int64))

        monkeypatch.setattr(bench.time, "perf_counter", tick)
        row = bench.measure(bench.Way("way", lambda: call), new_tokens=11, repeats=3)
        assert row.prompt.median == 6.0
        assert row.call.values == (16.0, 16.0, 16.0)
        assert row.decode.median == 10.0
        assert row.rate == 2 * 10 / 10.0
        assert row.ms_per_step == 1000.0
        assert row.warm_up == 16.0

    def test_it_stops_where_it_is_told_to(self) -> None:
        outcome = bench.Outcome(torch.zeros(1, 4, dtype=torch.int64))
        row = bench.measure(bench.Way("way", lambda: lambda _: outcome), 4, repeats=9, over=lambda: True)
        assert len(row.call.values) == 1

    def test_a_way_may_have_a_clock_of_its_own(self) -> None:
        outcome = bench.Outcome(torch.zeros(1, 4, dtype=torch.int64), decode_seconds=2.0)
        row = bench.measure(bench.Way("way", lambda: lambda _: outcome), 4, repeats=2)
        assert row.decode.values == (2.0, 2.0)


def test_equal_tokens_are_counted_from_the_start() -> None:
    expected = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 8]])
    assert bench.leading_equal(other, expected) == 2
    assert bench.same_text(other, expected) == "2 first"
    assert bench.same_text(expected, expected) == "yes"


@pytest.fixture(scope="module")
def result() -> bench.Result:
    return bench.run(task(tiny("llama"), draft=noisy_copy("llama")), quiet=True)


class TestRun:
    def test_all_ways_say_the_same(self, result: bench.Result) -> None:
        names = [row.name for row in result.rows]
        assert names == ["generate", "generate, assistant of 2", "specc, 1 a step", "specc, 3 a step"]
        assert all(torch.equal(row.tokens, result.rows[0].tokens) for row in result.rows)
        assert result.identical
        assert not result.failures

    def test_the_table_has_a_line_for_each(self, result: bench.Result) -> None:
        title, header, *lines = result.table().splitlines()
        assert title == f"tiny on cpu, float32: 12 prompt tokens, {NEW_TOKENS} new, 2 repeats"
        assert header.split()[0] == "tok/s"
        assert [line[: bench.NAME_WIDTH].strip() for line in lines] == [row.name for row in result.rows]

    def test_the_record_is_json(self, result: bench.Result, tmp_path: Path) -> None:
        path = tmp_path / "result.json"
        result.save(str(path))
        record = json.loads(path.read_text())
        assert [row["leading_equal"] for row in record["rows"]] == [NEW_TOKENS] * 4
        assert all(row["tokens_per_second"] > 0 for row in record["rows"])

    def test_a_file_that_cannot_be_written(self, result: bench.Result, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot write"):
            result.save(str(tmp_path / "none" / "result.json"))

    def test_what_hugging_face_refuses_is_in_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench, "_ours", lambda task: [])
        inputs = {name: each.clamp(max=RECURRENT_VOCAB - 1) for name, each in prompt(1).items()}
        result = bench.run(task(tiny_recurrent("qwen3_5"), inputs=inputs), quiet=True)
        assert [row.name for row in result.rows] == ["generate"]
        assert list(result.failures) == ["generate, lookup of 2"]
        assert result.table().splitlines()[-1].startswith("generate, lookup of 2")

    def test_other_tokens_are_seen(self, result: bench.Result) -> None:
        *rows, last = result.rows
        wrong = bench.dataclasses.replace(last, tokens=(last.tokens + 1) % VOCAB)
        assert not bench.Result(result.task, [*rows, wrong], {}).identical


@pytest.mark.parametrize("wrong", [0, -3, 65])
def test_a_block_that_specc_refuses_is_refused_before_anything_is_timed(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("something was timed"))
    with pytest.raises(InputError, match=f"from 1 to 64 .* got {wrong}"):
        bench.run(task(tiny("llama"), blocks=[4, wrong]), quiet=True)


def test_a_block_asked_for_twice_has_one_row() -> None:
    result = bench.run(task(tiny("llama"), blocks=[3, 3, 1], repeats=1), quiet=True)
    names = [row.name for row in result.rows]
    assert names == ["generate", "generate, lookup of 2", "specc, 1 a step", "specc, 3 a step"]
