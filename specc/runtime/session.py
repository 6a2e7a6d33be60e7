"""One call: prefill, then steps until every row has stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specc import compat
from specc.errors import PoolError, SpeccError, StepCaptureError
from specc.options import Options
from specc.progress import part
from specc.runtime import workspace
from specc.runtime.acceptance import commit, target_choice
from specc.runtime.batch import Batch, bucket_of
from specc.runtime.device_graph import (
    DeviceGraph,
    EagerGraph,
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
from specc.runtime.masks import MaskPlan
from specc.runtime.model import DRAFT, PREFILL_CHUNK, VERIFY, BoundModel, Role, fed_length
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
    """How a generation went. ``steps`` counts one per row and step, ``batch_steps`` one for all rows.

    Prefill is no step. ``new_tokens``: tokens returned, padding not counted. ``mean_accepted_length``: tokens
    committed per row and step, bonus included, before a stop found on the host cut any off.
    ``acceptance[j]``: share of steps whose draft j + 1 was accepted. Seconds are wall clock;
    ``compile_seconds`` is the first call of each graph and ``capture_seconds`` the capture of the step as one
    device graph of ``graph_nodes`` nodes (None: the step ran eagerly); ``decode_seconds`` leaves both out.
    ``host_seconds``: the part of it in which the host did not wait for the device.
    """

    steps: int
    batch_steps: int
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
    count = len(request.prompts)
    batch = Batch.of(request.prompts, request.attention_mask, bucket_of(count) if _keeps(request) else count)
    space = _seated(request, batch)
    state, target, drafter, link = space.state, space.target, space.drafter, space.link
    drain = Drain(
        request.prompts, request.max_new_tokens, request.criteria, request.pad_token, request.streamer, link
    )
    ops = StepOps.of(request.options)
    compile_seconds = target.warm_up_prefill() + drafter.warm_up_prefill()
    _, prefill_seconds = _timed(lambda: _prefill(space, batch, ops, drain))
    loop = _Loop(space, batch, drain, request)
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
        batch_steps=loop.tally.batch_steps,
        new_tokens=drain.handed_over,
        mean_accepted_length=loop.tally.mean_accepted_length,
        acceptance=loop.tally.acceptance,
        prefill_seconds=prefill_seconds,
        decode_seconds=loop.seconds,
        compile_seconds=compile_seconds,
        capture_seconds=loop.capture_seconds,
        host_seconds=loop.seconds - loop.waited,
        graph_nodes=loop.graph_nodes,
    )


def _keeps(request: Request) -> bool:
    """Whether the step is captured, and so kept with its tensors for the next batch of the kind."""
    return request.compiled and request.device_graph != "off" and freezes(request.prompts.device)


def _seated(request: Request, batch: Batch) -> Workspace:
    """The batch in the tensors of the one before, if they suit, or else in its own."""
    needed = batch.width + request.max_new_tokens + request.num_draft_tokens
    if not _keeps(request):
        return _made(request, batch, *_needs(request, batch, needed))
    key, rows = _needs(request, batch, _rounded_up(needed))
    space = workspace.take(request.model, key, request.draft, rows)
    if space is not None:
        space.state.restart(batch.aligned, batch.lens, live=batch.live, **_ends(request))
        for each in (space.target, space.drafter):
            each.seat(rows, _last_position(request))
        return space
    with contextlib.suppress(PoolError):
        return _made(request, batch, key, rows)
    # What was kept before, by any model, may stand in the way, and so may the room to spare.
    workspace.reset()
    gc.collect()
    return _made(request, batch, *_needs(request, batch, needed))


def _graph_for(request: Request) -> DeviceGraph:
    device = request.prompts.device
    return device_graph(device) if _keeps(request) else EagerGraph(device)


def _rounded_up(needed: int) -> int:
    """Tokens that a row's text can have: some more than this batch needs, for the sake of others."""
    unit = max(LEAST_ROOM, 1 << (needed.bit_length() - 4))
    return -(-needed // unit) * unit


def _needs(request: Request, batch: Batch, capacity: int) -> tuple[StepKey, Rows]:
    """The kind of step, and what its rows need, where a row's text can have ``capacity`` tokens."""
    # An assistant feeds one token more than it drafts.
    rows = batch.rows(capacity - batch.width, idle_beyond=request.num_draft_tokens + 1)
    return _key(request, batch, capacity), rows


def _last_position(request: Request) -> int:
    return request.prompts.shape[1] + request.max_new_tokens - 1


def _ends(request: Request) -> dict[str, Any]:
    names = ("max_new_tokens", "eos", "held_ids", "held_until")
    return {name: getattr(request, name) for name in names}


def _key(request: Request, batch: Batch, capacity: int) -> StepKey:
    device, assisted = batch.prompts.device, not isinstance(request.draft, str)
    models = (request.model, request.draft) if assisted else (request.model,)
    return StepKey(
        method="assistant" if assisted else request.draft,
        num_draft_tokens=request.num_draft_tokens,
        rows=len(batch.lens),
        capacity=capacity,
        num_eos=request.eos.numel(),
        num_held=request.held_ids.numel(),
        device=device,
        queue=queue_of(device),
        options=request.options,
        device_graph=request.device_graph,
        prefill_chunk=request.prefill_chunk,
        dtypes=(
            request.model.dtype,
            request.draft.dtype if assisted else None,
            request.kv_dtype,
            request.state_dtype,
        ),
        masks=tuple(map(_masks, models)),
    )


def _masks(model: Any) -> tuple[MaskPlan, tuple[int, ...]]:
    config, plan = model.config.get_text_config(), MaskPlan.of(model)
    return plan, tuple(plan.windows(config, config.num_hidden_layers))


# What is kept may serve a call outside of inference mode, whatever mode it was made in.
@torch.inference_mode(False)
@torch.no_grad()
def _made(request: Request, batch: Batch, key: StepKey, rows: Rows) -> Workspace:
    """A workspace of the batch's own. Raises PoolError if memory does not suffice."""
    # The pools first: they are what may not fit.
    target, drafter = _pools(request, rows)
    state = DecodeState.start(
        batch.aligned,
        batch.lens,
        live=batch.live,
        num_draft_tokens=request.num_draft_tokens,
        capacity=key.capacity,
        **_ends(request),
    )
    draft = None if isinstance(request.draft, str) else weakref.ref(request.draft)
    return Workspace(key, state, target, drafter, draft, host_link(batch.prompts.device))


def _pools(request: Request, rows: Rows) -> tuple[BoundModel, Drafter]:
    """The models over empty pools. Raises PoolError if memory does not suffice."""
    bind = functools.partial(_bind, request, rows=rows)
    target = bind(request.model, VERIFY, request.options, q_len=request.num_draft_tokens)
    num_drafts = request.num_draft_tokens - 1
    if isinstance(request.draft, str):
        return target, NGramDrafter(num_drafts)
    # Drafts are verified, whatever their last bits are.
    options = dataclasses.replace(request.options, exact=False)
    return target, AssistantDrafter(bind(request.draft, DRAFT, options, q_len=FED), num_drafts)


def _prefill(space: Workspace, batch: Batch, ops: StepOps, drain: Drain) -> None:
    """Read the prompts and commit each row's first token, which is the first bonus token."""
    state, link = space.state, space.link
    logits = space.target.prefill(batch.prompts, state.prompt_lens)
    space.drafter.prefill(batch.prompts, state.prompt_lens)
    drain.begin()
    choice = target_choice(state, logits[:, None], ops.select)
    no_drafts = torch.zeros_like(state.text_lens)
    write_report(state, choice, no_drafts, commit(state, choice, no_drafts))
    report = state.report[: batch.live]
    link.expect(report, 1)
    link.send(report)
    link.wait()
    drain.take(StepReport.of(link.receive()))
    _stop_rows(space, drain)


def _stop_rows(space: Workspace, drain: Drain) -> None:
    """Tell the device which rows the host wants no more of; steps queued before still run for them."""
    stopped = torch.tensor(drain.stopped_rows, device="cpu")
    space.link.upload(stopped, space.state.stopped[: len(stopped)])
    space.state.done |= space.state.stopped


class _Loop:
    """Steps until every row has stopped, some of them queued ahead of what the host has seen."""

    def __init__(self, space: Workspace, batch: Batch, drain: Drain, request: Request) -> None:
        self._space = space
        self._live = batch.live
        self._prompt_lens = batch.lens.cpu()
        self._state = space.state
        self._report = space.state.report[: batch.live]
        self._link = space.link
        self._drain = drain
        self._request = request
        self.tally = Tally(request.num_draft_tokens)
        self.graph_nodes: int | None = None
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
        graph = _graph_for(self._request)
        try:
            graph.capture(program)
        except StepCaptureError as error:
            if self._request.device_graph != "try":
                raise
            log.warning("the step runs eagerly: %s", error)
            graph = EagerGraph(self._state.text.device)
            graph.capture(program)
        return graph

    def run(self) -> None:
        self._link.expect(self._report, self._steps_ahead())
        _, self.seconds = _timed(self._run)

    def _run(self) -> None:
        drain, queued, ahead = self._drain, 0, self._steps_ahead()
        while not drain.finished:
            wanted = min(ahead, drain.most_steps_left)
            while queued < wanted:
                self._replay()
                self._link.send(self._report)
                queued += 1
            stopped = drain.stopped_rows
            if queued == 0 or not self._take(stopped):
                raise SpeccError(
                    "every row has ended, but the stopping criteria want more tokens: pass a max_new_tokens "
                    "and EOS ids that agree with them, or use the model's own generate"
                )
            queued -= 1
            if drain.stopped_rows is not stopped:
                _stop_rows(self._space, drain)
        self._link.discard()

    def _steps_ahead(self) -> int:
        graph = self._space.graph
        if graph is not None and graph.takes_lengths:
            return 1
        return self._request.steps_ahead or self._link.steps_ahead

    def _replay(self) -> None:
        graph = self._space.graph
        assert graph is not None
        self.graph_nodes = graph.num_nodes
        if graph.takes_lengths:
            seq_lens = self._prompt_lens.clone()
            seq_lens[: self._live] += torch.tensor(self._drain.lens, device="cpu") - 1
            graph.patch(seq_lens)
        if log.isEnabledFor(logging.DEBUG) and _keeps(self._request):
            self._check_addresses()
        graph.replay()

    def _check_addresses(self) -> None:
        name = self._space.moved()
        if name is not None:
            raise SpeccError(
                f"{name} was moved while its model generates, and the captured step reads it where it was: "
                f"change tensors in place, or weights between calls"
            )

    def _take(self, stopped: Sequence[bool]) -> bool:
        """Give the host what the oldest step did; whether that was anything. stopped: rows that were."""
        _, waited = _timed(self._link.wait)
        self.waited += waited
        # What a row did after the host stopped it is surplus: results are those of one step at a time.
        report = StepReport.of(self._link.receive()).without(stopped)
        self.tally.count(report)
        self._drain.take(report)
        return any(report.committed)


def _bind(
    request: Request, model: Any, role: Role, options: Options, *, q_len: int, rows: Rows
) -> BoundModel:
    return BoundModel(
        model,
        role,
        rows=rows,
        q_len=q_len,
        last_position=_last_position(request),
        options=options,
        compiled=request.compiled,
        plan=_plan(request, role, options, q_len),
        chunk=request.prefill_chunk,
        kv_dtype=request.kv_dtype,
    )


def _plan(request: Request, role: Role, options: Options, q_len: int) -> RecurrentPlan:
    # An assistant feeds one more token than it drafts, block by block.
    fed = request.num_draft_tokens + 1 if role is DRAFT else fed_length(q_len, options)
    return RecurrentPlan(
        ahead=fed,
        snapshots=options.state_commit == "snapshot",
        exact=bool(options.exact),
        dtype=request.state_dtype,
    )


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start
