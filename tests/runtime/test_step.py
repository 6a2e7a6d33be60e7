"""The pieces of the step against plain Python: prompt lookup, commit, the masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specc.lowerings import greedy_select
from specc.runtime.acceptance import commit, target_choice
from specc.runtime.device_graph import EagerGraph, device_graph
from specc.runtime.drafters.ngram import lookup
from specc.runtime.masks import MaskPlan
from specc.runtime.reports import StepReport, Tally, write_report
from specc.runtime.state import DecodeState

FAST = settings(max_examples=150, deadline=None)
SMALL = st.integers(0, 4)


def lookup_in_python(text: list[int], num_drafts: int, max_ngram: int) -> list[int]:
    for size in range(max_ngram, 0, -1):
        for start in range(len(text) - 1 - size, -1, -1):
            if text[start : start + size] == text[len(text) - size :] and size < len(text):
                behind = text[start + size :]
                return [behind[i % len(behind)] for i in range(num_drafts)]
    return [text[-1]] * num_drafts


@FAST
@given(
    rows=st.lists(st.lists(SMALL, min_size=1, max_size=24), min_size=1, max_size=4),
    num_drafts=st.integers(0, 9),
    max_ngram=st.integers(1, 4),
    scratch=SMALL,
)
def test_lookup(rows: list[list[int]], num_drafts: int, max_ngram: int, scratch: int) -> None:
    """What lies behind a row's length is scratch and must not be found."""
    width = max(map(len, rows)) + 3
    text = torch.tensor([row + [scratch] * (width - len(row)) for row in rows])
    lens = torch.tensor([len(row) for row in rows])
    drafts = lookup(text, lens, num_drafts, max_ngram)
    assert drafts.tolist() == [lookup_in_python(row, num_drafts, max_ngram) for row in rows]


def state_of(
    prompts: list[list[int]], done: list[bool], limits: list[int], eos: list[int], width: int
) -> DecodeState:
    lens = torch.tensor([len(row) for row in prompts])
    ids = torch.tensor([row + [0] * (max(map(len, prompts)) - len(row)) for row in prompts])
    state = DecodeState.start(
        ids,
        lens,
        live=len(prompts),
        max_new_tokens=0,
        eos=torch.tensor(eos, dtype=torch.int64),
        held_ids=torch.tensor([], dtype=torch.int64),
        held_until=torch.tensor([], dtype=torch.int64),
        num_draft_tokens=width,
        capacity=64,
    )
    state.limits = torch.tensor(limits)
    state.done = torch.tensor(done)
    return state


def commit_in_python(
    text: list[int], done: bool, limit: int, eos: list[int], choice: list[int], num_correct: int
) -> tuple[list[int], bool]:
    if done:
        return text, True
    for token in choice[: num_correct + 1]:
        text = [*text, token]
        if token in eos:
            return text, True
        if len(text) == limit:
            return text, True
    return text, False


@FAST
@given(data=st.data())
def test_commit(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    prompts = [data.draw(st.lists(SMALL, min_size=1, max_size=5)) for _ in range(rows)]
    done = [data.draw(st.booleans()) for _ in range(rows)]
    limits = [len(row) + data.draw(st.integers(1, 8)) for row in prompts]
    eos = data.draw(st.lists(SMALL, max_size=2))
    choice = [data.draw(st.lists(SMALL, min_size=width, max_size=width)) for _ in range(rows)]
    correct = [data.draw(st.integers(0, width - 1)) for _ in range(rows)]
    state = state_of(prompts, done, limits, eos, width)

    run = commit(state, torch.tensor(choice), torch.tensor(correct))
    write_report(state, torch.tensor(choice), torch.tensor(correct), run)

    report = StepReport.of(state.report.tolist())
    assert report.tokens == choice
    assert report.committed == run.tolist()
    live = [row for row in range(rows) if not done[row]]
    tally = Tally(width)
    tally.count(report)
    assert tally.steps == len(live)
    assert tally.batch_steps == bool(live)
    shares = [sum(correct[r] > j for r in live) / max(len(live), 1) for j in range(width - 1)]
    assert tally.acceptance == shares
    for row in range(rows):
        text, stopped = commit_in_python(prompts[row], done[row], limits[row], eos, choice[row], correct[row])
        length = int(state.text_lens[row])
        assert state.text[row, :length].tolist() == text
        assert bool(state.done[row]) == stopped
        assert int(run[row]) == length - len(prompts[row])


# Vectors for the end of an output: [(prompt + output so far, run, cap) -> kept, done].
@pytest.mark.parametrize(
    ("run", "room", "kept", "done"),
    [
        ([12, 99, 20], 3, 2, True),  # EOS inside the run
        ([12, 99, 20], 98, 2, True),
        ([12, 20, 99], 2, 2, True),  # EOS beyond the cap: a length stop at the cap
        ([12, 20, 21], 2, 2, True),
        ([99], 1, 1, True),  # EOS as the last token allowed
        ([11, 12, 13], 98, 3, False),
    ],
)
def test_where_an_output_ends(run: list[int], room: int, kept: int, done: bool) -> None:
    state = state_of([[10, 11]], [False], [2 + room], [99], len(run))
    committed = commit(state, torch.tensor([run]), torch.tensor([len(run) - 1]))
    assert (int(committed[0]), bool(state.done[0])) == (kept, done)


def test_ids_are_held_back_each_for_its_own_number_of_new_tokens() -> None:
    """Ids that are no tokens (-1 means never, 500 is beyond the vocabulary) stand for nothing."""
    state = state_of([[5], [5]], [False, False], [50, 50], [], 3)
    state.text_lens = torch.tensor([1, 3])  # 0 and 2 new tokens so far
    state.held_ids, state.held_until = torch.tensor([1, 3, -1, 500]), torch.tensor([4, 2, 9, 9])
    logits = torch.zeros(2, 3, 8)
    logits[..., 1], logits[..., 3], logits[..., 7] = 9.0, 8.0, 7.0
    assert target_choice(state, logits, greedy_select).tolist() == [[7, 7, 3], [3, 3, 1]]


def dense_mask(pattern: str, size: int, position: int, capacity: int) -> list[bool]:
    allowed = {
        "full_attention": lambda t: t <= position,
        "sliding_attention": lambda t: position - size < t <= position,
        "chunked_attention": lambda t: t <= position and t // size == position // size,
    }[pattern]
    return [allowed(t) for t in range(capacity)]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("pattern", "size"), [("full_attention", 0), ("sliding_attention", 4), ("chunked_attention", 4)]
)
def test_masks(pattern: str, size: int, additive: bool) -> None:
    """A window of W keys counts the query itself (W = 4 at position 10 sees 7 to 10)."""
    positions = torch.tensor([[0, 1, 2], [10, 11, 12], [3, 4, 5]])
    plan = MaskPlan(((pattern, size),), by_layer_type=False, additive=additive)
    mask = plan.build(positions, 16, torch.float32)
    assert mask.shape == (3, 1, 3, 16)
    visible = mask == 0 if additive else mask
    for row in range(3):
        for j in range(3):
            wanted = dense_mask(pattern, size, int(positions[row, j]), 16)
            assert visible[row, 0, j].tolist() == wanted
    if additive:
        assert set(mask.unique().tolist()) == {torch.finfo(torch.float32).min, 0.0}


def test_the_eager_graph_replays_its_program() -> None:
    counter = torch.zeros(())
    graph = device_graph(torch.device("cpu"))
    assert isinstance(graph, EagerGraph)
    with pytest.raises(RuntimeError, match="capture"):
        graph.replay()
    graph.capture(lambda: counter.add_(1) and None)
    for _ in range(3):
        graph.replay()
    assert int(counter) == 3


@pytest.mark.parametrize("eos", [(), (7, 11)])
def test_results_do_not_depend_on_how_many_steps_are_queued(eos: tuple[int, ...]) -> None:
    """Rows that a criterion of the user's stops go on for a while on the device; nobody gets to see it."""
    import dataclasses

    import specc
    from tests.families import noisy_copy, prompt, tiny

    class ThirdRowStops:
        def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
            return torch.tensor([row == 2 and ids.shape[1] >= 25 for row in range(ids.shape[0])])

    def outcome(**settings: Any) -> Any:
        output = specc.generate(
            tiny("llama"),
            **prompt(4),
            draft=noisy_copy("llama"),
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            compile=False,
            stopping_criteria=[ThirdRowStops()],
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            **settings,
        )
        told = dataclasses.asdict(output.speculation)
        counts = ("steps", "new_tokens", "mean_accepted_length", "acceptance")
        return output.sequences.tolist(), [told[name] for name in counts]

    one = outcome(steps_ahead=1)
    for ahead in (2, 3, 7):
        assert outcome(steps_ahead=ahead) == one
