"""One call: prefill, then steps until every row has stopped."""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specc import compat
from specc.errors import PoolError, SpeccError, StepCaptureError
from specc.options import Options
from specc.progress import part
from specc.runtime import workspace
from specc.runtime.acceptance import commit, target_choice
from specc.runtime.device_graph import (
    DeviceGraph,
    EagerGraph,
    HostLink,
    Program,
    device_graph,
    freezes,
    host_link,
    queue_of,
)
from specc.runtime.drafters import Drafter
from specc.runtime.drafters.assistant import FED, AssistantDrafter
from specc.runtime.drafters.ngram import NGramDrafter
from specc.runtime.drain import Drain
from specc.runtime.model import DRAFT, PREFILL_CHUNK, VERIFY, BoundModel
from specc.runtime.pages import Rows
from specc.runtime.recurrent import RecurrentPlan
from specc.runtime.reports import StepReport, Tally, write_report
from specc.runtime.state import DecodeState
from specc.runtime.step import StepOps, speculative_step
from specc.runtime.workspace import StepKey, Workspace

log = logging.getLogger(__name__)

# Rows are given room in units of this many tokens, or of an eighth of what they need.
LEAST_ROOM = 256


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything a batch needs. Checked before it gets here.

    prompts: int64 [B, P], left-padded; attention_mask: [B, P], 0 on padding, or None for none.
    draft: "ngram" or a causal LM. eos: int64 [number of EOS ids]; held_ids, held_until: int64 [n], see
    DecodeState. prefill_chunk, kv_dtype: see BoundModel. state_dtype: of recurrent states. device_graph:
    "on", "try" or "off"; steps_ahead: steps queued before the host looks at the first, None for as many as
    pay on the device.
    """

    model: Any
    prompts: Tensor
    attention_mask: Tensor | None
    draft: Any
    num_draft_tokens: int
    max_new_tokens: int
    eos: Tensor
    held_ids: Tensor
    held_until: Tensor
    pad_token: int | None
    criteria: Any
    streamer: Any
    options: Options
    compiled: bool
    prefill_chunk: int = PREFILL_CHUNK
    kv_dtype: torch.dtype | None = None
    state_dtype: torch.dtype = torch.float32
    device_graph: str = "on"
    steps_ahead: int | None = None


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a generation went. ``steps`` counts one per row and step; prefill is none.

    ``new_tokens``: tokens returned, padding not counted. ``mean_accepted_length``: tokens committed per
    step, bonus included, before a stop found on the host cut any off.
    ``acceptance[j]``: share of steps whose draft j + 1 was accepted. Seconds are wall clock;
    ``compile_seconds`` is the first call of each graph and ``capture_seconds`` the capture of the step as one
    device graph of ``graph_nodes`` nodes (None: the step ran eagerly); ``decode_seconds`` leaves both out.
    ``host_seconds``: the part of it in which the host did not wait for the device.
    """

    steps: int
    new_tokens: int
    mean_accepted_length: float
    acceptance: list[float]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    capture_seconds: float = 0.0
    host_seconds: float = 0.0
    graph_nodes: int | None = None


def run(request: Request) -> tuple[Tensor, Speculation]:
    """Generate. Returns sequences int64 [B, P + new tokens] on the prompts' device, and how it went."""
    prompts, prompt_lens = _left_aligned(request.prompts, request.attention_mask)
    capacity = _capacity(request)
    rows = Rows.of(_texts(prompts, prompt_lens), capacity - prompts.shape[1])
    space = _seated(request, rows, prompts, prompt_lens, capacity)
    state, target, drafter, link = space.state, space.target, space.drafter, space.link
    drain = Drain(
        request.prompts, request.max_new_tokens, request.criteria, request.pad_token, request.streamer, link
    )
    ops = StepOps.of(request.options)
    compile_seconds = target.warm_up_prefill() + drafter.warm_up_prefill()
    _, prefill_seconds = _timed(lambda: _prefill(state, target, drafter, ops, request.prompts, drain, link))
    loop = _Loop(space, drain, request)
    if not drain.finished:
        compile_seconds += target.warm_up() + drafter.warm_up()
        loop.capture(lambda: speculative_step(state, target, drafter, ops))
    loop.run()
    drain.end()
    sequences = drain.sequences.to(request.prompts.device)
    if _keeps(request):
        workspace.keep(request.model, space)
    return sequences, Speculation(
        steps=loop.tally.steps,
        new_tokens=drain.handed_over,
        mean_accepted_length=loop.tally.mean_accepted_length,
        acceptance=loop.tally.acceptance,
        prefill_seconds=prefill_seconds,
        decode_seconds=loop.seconds,
        compile_seconds=compile_seconds,
        capture_seconds=loop.capture_seconds,
        host_seconds=loop.seconds - loop.waited,
        graph_nodes=space.graph.num_nodes if space.graph is not None else None,
    )


def _keeps(request: Request) -> bool:
    """Whether the step is captured, and so kept with its tensors for the next batch of the kind."""
    return request.compiled and request.device_graph != "off" and freezes(request.prompts.device)


def _capacity(request: Request) -> int:
    """Tokens that a row's text can have; where the step is kept, some more, for the sake of other batches."""
    needed = request.prompts.shape[1] + request.max_new_tokens + request.num_draft_tokens
    if not _keeps(request):
        return needed
    unit = max(LEAST_ROOM, 1 << (needed.bit_length() - 4))
    return -(-needed // unit) * unit


def _seated(request: Request, rows: Rows, prompts: Tensor, prompt_lens: Tensor, capacity: int) -> Workspace:
    """The batch in the tensors of the one before, if they suit, or else in its own.

    prompts: int64 [B, P], right-padded.
    """
    assisted = not isinstance(request.draft, str)
    key = StepKey(
        method="assistant" if assisted else request.draft,
        num_draft_tokens=request.num_draft_tokens,
        rows=len(rows.leaders),
        capacity=capacity,
        num_eos=request.eos.numel(),
        num_held=request.held_ids.numel(),
        device=prompts.device,
        queue=queue_of(prompts.device),
        options=request.options,
        device_graph=request.device_graph,
        prefill_chunk=request.prefill_chunk,
        dtypes=(
            request.model.dtype,
            request.draft.dtype if assisted else None,
            request.kv_dtype,
            request.state_dtype,
        ),
    )
    ends: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "eos": request.eos,
        "held_ids": request.held_ids,
        "held_until": request.held_until,
    }
    space = workspace.take(request.model, key, request.draft, rows) if _keeps(request) else None
    if space is not None:
        space.state.restart(prompts, prompt_lens, **ends)
        for each in (space.target, space.drafter):
            each.seat(rows, _last_position(request))
        return space
    try:
        target, drafter = _pools(request, rows)
    except PoolError:
        if not workspace.reset():
            raise
        # What other models kept stood in the way.
        target, drafter = _pools(request, rows)
    state = DecodeState.start(
        prompts, prompt_lens, num_draft_tokens=request.num_draft_tokens, capacity=capacity, **ends
    )
    draft = weakref.ref(request.draft) if assisted else None
    return Workspace(key, state, target, drafter, draft, host_link(prompts.device))


def _pools(request: Request, rows: Rows) -> tuple[BoundModel, Drafter]:
    """The models over empty pools. Raises PoolError if memory does not suffice."""
    return _bind(request, request.model, VERIFY, request.num_draft_tokens, rows), _drafter(request, rows)


def _prefill(
    state: DecodeState,
    target: BoundModel,
    drafter: Drafter,
    ops: StepOps,
    prompts: Tensor,
    drain: Drain,
    link: HostLink,
) -> None:
    """Read the prompts and commit each row's first token, which is the first bonus token."""
    logits = target.prefill(prompts, state.prompt_lens)
    drafter.prefill(prompts, state.prompt_lens)
    drain.begin()
    choice = target_choice(state, logits[:, None], ops.select)
    no_drafts = torch.zeros_like(state.text_lens)
    write_report(state, choice, no_drafts, commit(state, choice, no_drafts))
    link.send(state.report)
    drain.take(StepReport.of(link.receive()))
    _stop_rows(state, drain, link)


def _stop_rows(state: DecodeState, drain: Drain, link: HostLink) -> None:
    """Tell the device which rows the host wants no more of; steps queued before still run for them."""
    link.upload(drain.stopped_rows, state.stopped)
    state.done |= state.stopped


class _Loop:
    """Steps until every row has stopped, some of them queued ahead of what the host has seen."""

    def __init__(self, space: Workspace, drain: Drain, request: Request) -> None:
        self._space = space
        self._state = space.state
        self._link = space.link
        self._drain = drain
        self._request = request
        self._ahead = request.steps_ahead or space.link.steps_ahead
        self.tally = Tally(request.num_draft_tokens)
        self.capture_seconds = self.seconds = self.waited = 0.0

    def capture(self, program: Program) -> None:
        """Take the step, as one device graph if that is wanted and not done. Nothing that counts changes."""
        if self._space.serves():
            return
        running = self._state.done.clone()
        # A capture may run the step: rows that are done commit nothing.
        self._state.done.fill_(True)
        with part("capturing the step", quiet=not compat.shows_progress()):
            graph, self.capture_seconds = _timed(lambda: self._captured(program))
        self._state.done.copy_(running)
        self._space.captured(graph)

    def _captured(self, program: Program) -> DeviceGraph:
        graph = device_graph(self._state.text.device) if _keeps(self._request) else EagerGraph()
        try:
            graph.capture(program)
        except StepCaptureError as error:
            if self._request.device_graph != "try":
                raise
            log.warning("the step runs eagerly: %s", error)
            graph = EagerGraph()
            graph.capture(program)
        return graph

    def run(self) -> None:
        _, self.seconds = _timed(self._run)

    def _run(self) -> None:
        drain, queued = self._drain, 0
        while not drain.finished:
            while queued < min(self._ahead, drain.most_steps_left):
                self._replay()
                self._link.send(self._state.report)
                queued += 1
            stopped = drain.stopped_rows
            if queued == 0 or not self._take(stopped):
                raise SpeccError(
                    "every row has ended, but the stopping criteria want more tokens: pass a max_new_tokens "
                    "and EOS ids that agree with them, or use the model's own generate"
                )
            queued -= 1
            if not torch.equal(drain.stopped_rows, stopped):
                _stop_rows(self._state, drain, self._link)
        self._link.discard()

    def _replay(self) -> None:
        graph = self._space.graph
        assert graph is not None
        if graph.frozen and log.isEnabledFor(logging.DEBUG):
            self._check_addresses()
        graph.replay()

    def _check_addresses(self) -> None:
        name = self._space.moved()
        if name is not None:
            raise SpeccError(
                f"{name} was moved while its model generates, and the captured step reads it where it was: "
                f"change weights in place, or between calls"
            )

    def _take(self, stopped: Tensor) -> bool:
        """Give the host what the oldest step did; whether that was anything. stopped: bool [B]."""
        raw, waited = _timed(self._link.receive)
        self.waited += waited
        # What a row did after the host stopped it is surplus: results are those of one step at a time.
        report = StepReport.of(raw).without(stopped)
        self.tally.count(report)
        self._drain.take(report)
        return bool(report.committed.any())


def _left_aligned(prompts: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to its front. Returns the prompts, right-padded, and lengths int64 [B]."""
    rows, width = prompts.shape
    if attention_mask is None:
        return prompts, torch.full((rows,), width, dtype=torch.int64, device=prompts.device)
    prompt_lens = (attention_mask != 0).sum(dim=1)
    source = torch.arange(width, device=prompts.device) + (width - prompt_lens)[:, None]
    return prompts.gather(1, source.clamp(max=width - 1)), prompt_lens


def _texts(prompts: Tensor, prompt_lens: Tensor) -> list[list[int]]:
    """Each row's tokens, without padding. prompts: right-padded."""
    lens = prompt_lens.tolist()
    return [text[:length] for text, length in zip(prompts.tolist(), lens, strict=True)]


def _bind(request: Request, model: Any, role: Any, q_len: int, rows: Rows) -> BoundModel:
    return BoundModel(
        model,
        role,
        rows=rows,
        q_len=q_len,
        last_position=_last_position(request),
        options=request.options,
        compiled=request.compiled,
        plan=_plan(request),
        chunk=request.prefill_chunk,
        kv_dtype=request.kv_dtype,
    )


def _last_position(request: Request) -> int:
    return request.prompts.shape[1] + request.max_new_tokens - 1


def _plan(request: Request) -> RecurrentPlan:
    return RecurrentPlan(
        # An assistant feeds one more token than it drafts.
        ahead=request.num_draft_tokens + 1,
        snapshots=request.options.state_commit == "snapshot",
        exact=request.options.exact,
        dtype=request.state_dtype,
    )


def _drafter(request: Request, rows: Rows) -> Drafter:
    num_drafts = request.num_draft_tokens - 1
    if isinstance(request.draft, str):
        return NGramDrafter(num_drafts)
    return AssistantDrafter(_bind(request, request.draft, DRAFT, FED, rows), num_drafts)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start
