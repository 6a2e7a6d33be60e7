"""The host's side of a step: tokens are handed over, and criteria asked, as plain decoding's loop does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from specc.errors import SpeccError
from specc.options import Options
from specc.runtime.device_graph import DirectLink
from specc.runtime.drain import Drain
from specc.runtime.reports import StepReport
from specc.runtime.session import Request, run
from tests.families import tiny

FAST = settings(max_examples=150, deadline=None)
SMALL = st.integers(0, 4)
PROMPT = 2


def drain_of(rows: int, new_tokens: int, criteria: Any, pad: int | None) -> Drain:
    prompts = torch.ones(rows, PROMPT, dtype=torch.int64)
    return Drain(prompts, new_tokens, criteria, pad, None, DirectLink(prompts.device))


class Counter:
    def __init__(self, stops: dict[int, int], eos: bool) -> None:
        self.stops, self.calls = stops, 0
        if eos:
            self.eos_token_id = torch.tensor([0])

    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([self.stops.get(row, 999) <= ids.shape[1] for row in range(ids.shape[0])])


class Criteria(list[Any]):
    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.stack([each(ids, scores) for each in self]).any(dim=0)


@FAST
@given(data=st.data(), pads=st.booleans())
def test_drain_is_plain_decodings_loop(data: st.DataObject, pads: bool) -> None:
    """However the rows' tokens arrive, criteria are called once per token and rows are padded alike."""
    rows, total, prompt = data.draw(st.integers(1, 4)), 12, PROMPT
    stops = {row: prompt + data.draw(st.integers(1, total)) for row in range(rows)}
    tokens = torch.arange(rows * total).reshape(rows, total) + 100
    criterion = Counter(stops, eos=pads)
    drain = drain_of(rows, total, Criteria([criterion]), 7)
    counts = torch.zeros(rows, dtype=torch.int64)
    block = torch.arange(5)
    while not drain.finished:
        gained = torch.tensor(data.draw(st.lists(SMALL, min_size=rows, max_size=rows)))
        gained[counts.argmin()] += 1
        gained = torch.minimum(gained, total - counts)
        assert drain.most_steps_left == int((total - counts)[~torch.tensor(drain.stopped_rows)].max())
        behind = (counts[:, None] + block).clamp(max=total - 1)
        blocks = torch.where(block < gained[:, None], tokens.gather(1, behind), -5)
        stopped = drain.stopped_rows
        drain.take(StepReport([0] * rows, gained.tolist(), blocks.tolist()))
        assert (drain.stopped_rows is stopped) == (drain.stopped_rows == stopped)
        counts += gained
    length = max(stops.values())
    assert drain.sequences.shape[1] == length
    assert criterion.calls == length - prompt
    for row in range(rows):
        own = stops[row] if pads else length
        expected = tokens[row, : own - prompt].tolist() + [7] * (length - own)
        assert drain.sequences[row, prompt:].tolist() == expected


@FAST
@given(data=st.data())
def test_criteria_of_transformers_stop_where_they_would_stop_generate(data: st.DataObject) -> None:
    """They are asked only where they may have something to say."""
    rows, total = data.draw(st.integers(1, 4)), 12
    tokens = [data.draw(st.lists(SMALL, min_size=total, max_size=total)) for _ in range(rows)]
    eos = data.draw(st.lists(SMALL, max_size=2))
    limit = PROMPT + data.draw(st.integers(1, total))
    positions = data.draw(st.none() | st.integers(1, PROMPT + total))
    criteria = StoppingCriteriaList([MaxLengthCriteria(limit, positions), MaxLengthCriteria(PROMPT + total)])
    if eos:
        criteria.append(EosTokenCriteria(eos))
    if data.draw(st.booleans()):
        criteria.append(MaxTimeCriteria(1e6))
    drain = drain_of(rows, total, criteria, 3)
    while not drain.finished:
        committed = [
            data.draw(st.integers(1, min(3, total - have) if have < total else 1)) for have in drain.lens
        ]
        blocks = [row[have : have + 3] for row, have in zip(tokens, drain.lens, strict=True)]
        drain.take(StepReport([0] * rows, committed, blocks))
    assert drain.sequences[:, PROMPT:].tolist() == plainly(tokens, criteria, pad=3)


@pytest.mark.parametrize("ids", [3, [3], torch.tensor(3), torch.tensor([[3, 4]])])
def test_eos_ids_come_in_any_shape(ids: Any) -> None:
    drain = drain_of(1, 8, StoppingCriteriaList([EosTokenCriteria(ids)]), 0)
    drain.take(StepReport([0], [4], [[1, 2, 3, 4]]))
    assert drain.finished
    assert drain.sequences[0, PROMPT:].tolist() == [1, 2, 3]


def test_the_host_keeps_to_itself_where_new_tensors_go_elsewhere() -> None:
    put: list[torch.Tensor] = []
    streamer = SimpleNamespace(put=put.append, end=lambda: None)
    with torch.device("meta"):
        prompts = torch.ones(1, PROMPT, dtype=torch.int64, device="cpu")
        criteria = StoppingCriteriaList([EosTokenCriteria(torch.tensor([3], device="cpu"))])
        drain = Drain(prompts, 8, criteria, 0, streamer, DirectLink(prompts.device))
        drain.take(StepReport([0], [3], [[1, 2, 3]]))
        assert drain.sequences[0, PROMPT:].tolist() == [1, 2, 3]
    assert [each.tolist() for each in put] == [[1], [2], [3]]


def test_a_reminder_of_the_models_length_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' criterion gives it for each length beyond the model's positions."""
    asked: list[int] = []
    ask = MaxLengthCriteria.__call__

    def listening(self: Any, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        asked.append(ids.shape[1])
        return ask(self, ids, scores)

    monkeypatch.setattr(MaxLengthCriteria, "__call__", listening)
    drain = drain_of(1, 8, StoppingCriteriaList([MaxLengthCriteria(PROMPT + 8, PROMPT + 5)]), None)
    drain.take(StepReport([0], [8], [list(range(8))]))
    assert drain.finished
    assert asked == [PROMPT + 6, PROMPT + 7, PROMPT + 8]


def plainly(tokens: list[list[int]], criteria: Any, pad: int) -> list[list[int]]:
    """The loop of ``GenerationMixin._sample``."""
    texts, unfinished = (
        torch.ones(len(tokens), PROMPT, dtype=torch.int64),
        torch.ones(len(tokens), dtype=bool),
    )
    pads = any(hasattr(each, "eos_token_id") for each in criteria)
    for column in torch.tensor(tokens).unbind(1):
        chosen = torch.where(unfinished, column, pad) if pads else column
        texts = torch.cat([texts, chosen[:, None]], dim=1)
        unfinished &= ~criteria(texts, None)
        if not unfinished.any():
            break
    return texts[:, PROMPT:].tolist()


def test_criteria_may_answer_with_a_python_bool() -> None:
    drain = drain_of(2, 9, Criteria([lambda ids, scores: ids.shape[1] >= 4]), None)
    drain.take(StepReport([2, 2], [2, 2], [[5, 6], [7, 8]]))
    assert drain.finished


def test_criteria_that_never_end_are_an_error_and_no_endless_loop() -> None:
    """The row is done on the device at its limit; a criterion that ignores the limit would wait for ever."""
    request = Request(
        model=tiny("llama"),
        prompts=torch.tensor([[3, 4, 5]]),
        attention_mask=None,
        draft="ngram",
        num_draft_tokens=2,
        max_new_tokens=6,
        eos=torch.tensor([], dtype=torch.int64),
        held_ids=torch.tensor([], dtype=torch.int64),
        held_until=torch.tensor([], dtype=torch.int64),
        pad_token=None,
        criteria=Criteria([Counter({}, eos=False)]),
        streamer=None,
        options=Options(),
        compiled=False,
    )
    with torch.no_grad(), pytest.raises(SpeccError, match="every row has ended"):
        run(request)
