"""One call: prefill, then steps until every row has stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specc.errors import SpeccError
from specc.options import Options
from specc.runtime.acceptance import commit, target_choice
from specc.runtime.device_graph import device_graph
from specc.runtime.drafters import Drafter
from specc.runtime.drafters.assistant import FED, AssistantDrafter
from specc.runtime.drafters.ngram import NGramDrafter
from specc.runtime.drain import Drain
from specc.runtime.model import DRAFT, PREFILL_CHUNK, VERIFY, BoundModel
from specc.runtime.pages import Rows
from specc.runtime.recurrent import RecurrentPlan
from specc.runtime.state import DecodeState
from specc.runtime.step import StepOps, speculative_step


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything a batch needs. Checked before it gets here.

    prompts: int64 [B, P], left-padded; attention_mask: [B, P], 0 on padding, or None for none.
    draft: "ngram" or a causal LM. eos: int64 [number of EOS ids]; held_ids, held_until: int64 [n], see
    DecodeState. prefill_chunk, kv_dtype: see BoundModel. state_dtype: of recurrent states.
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


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a generation went. ``steps`` counts one per row and step; prefill is none.

    ``new_tokens``: tokens returned, padding not counted. ``mean_accepted_length``: tokens committed per
    step, bonus included, before a stop found on the host cut any off.
    ``acceptance[j]``: share of steps whose draft j + 1 was accepted. Seconds are wall clock;
    ``compile_seconds`` is the first call of each graph, which ``decode_seconds`` leaves out.
    """

    steps: int
    new_tokens: int
    mean_accepted_length: float
    acceptance: list[float]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float


def run(request: Request) -> tuple[Tensor, Speculation]:
    """Generate. Returns sequences int64 [B, P + new tokens] on the prompts' device, and how it went."""
    prompts, prompt_lens = _left_aligned(request.prompts, request.attention_mask)
    beyond = request.max_new_tokens + request.num_draft_tokens
    rows = Rows.of(_texts(prompts, prompt_lens), beyond)
    # The pools first: they are what may not fit.
    target = _bind(request, request.model, VERIFY, request.num_draft_tokens, rows)
    drafter = _drafter(request, rows)
    state = DecodeState.start(
        prompts,
        prompt_lens,
        max_new_tokens=request.max_new_tokens,
        eos=request.eos,
        held_ids=request.held_ids,
        held_until=request.held_until,
        num_draft_tokens=request.num_draft_tokens,
        capacity=prompts.shape[1] + beyond,
    )
    drain = Drain(
        request.prompts, request.max_new_tokens, request.criteria, request.pad_token, request.streamer
    )
    ops = StepOps.of(request.options)
    compile_seconds = target.warm_up_prefill() + drafter.warm_up_prefill()
    _, prefill_seconds = _timed(lambda: _prefill(state, target, drafter, ops, request.prompts, drain))
    if not drain.finished:
        compile_seconds += target.warm_up() + drafter.warm_up()
    _, decode_seconds = _timed(lambda: _decode(state, target, drafter, ops, drain))
    drain.end()
    sequences = drain.sequences.to(request.prompts.device)
    speculation = _account(state, drain, prefill_seconds, decode_seconds, compile_seconds)
    return sequences, speculation


def _prefill(
    state: DecodeState,
    target: BoundModel,
    drafter: Drafter,
    ops: StepOps,
    prompts: Tensor,
    drain: Drain,
) -> None:
    """Read the prompts and commit each row's first token, which is the first bonus token."""
    logits = target.prefill(prompts, state.prompt_lens)
    drafter.prefill(prompts, state.prompt_lens)
    drain.begin()
    choice = target_choice(state, logits[:, None], ops.select)
    commit(state, choice, torch.zeros_like(state.text_lens))
    _hand_over(state, drain)


def _decode(state: DecodeState, target: BoundModel, drafter: Drafter, ops: StepOps, drain: Drain) -> None:
    graph = device_graph(state.text.device)
    graph.capture(lambda: speculative_step(state, target, drafter, ops))
    committed = 0
    while not drain.finished:
        graph.replay()
        before, committed = committed, _hand_over(state, drain)
        if committed == before and not drain.finished:
            raise SpeccError(
                "every row has ended, but the stopping criteria want more tokens: pass a max_new_tokens and "
                "EOS ids that agree with them, or use the model's own generate"
            )
    graph.reset()


def _hand_over(state: DecodeState, drain: Drain) -> int:
    """Give the host what is new, and stop the rows it does not want any more.

    Returns how many tokens all rows have committed so far.
    """
    counts = (state.text_lens - state.prompt_lens).cpu()
    tokens = _generated(state, int(counts.max())).cpu()
    drain.take(tokens, counts)
    state.done |= drain.stopped_rows.to(state.done.device)
    return int(counts.sum())


def _generated(state: DecodeState, count: int) -> Tensor:
    columns = state.prompt_lens[:, None] + torch.arange(count, device=state.text.device)
    return state.text.gather(1, columns)


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
        last_position=request.prompts.shape[1] + request.max_new_tokens - 1,
        options=request.options,
        compiled=request.compiled,
        plan=_plan(request),
        chunk=request.prefill_chunk,
        kv_dtype=request.kv_dtype,
    )


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


def _account(
    state: DecodeState, drain: Drain, prefill_seconds: float, decode_seconds: float, compile_seconds: float
) -> Speculation:
    steps = int(state.steps)
    # The first token of every row came from prefill, not from a step.
    stepped = int((state.text_lens - state.prompt_lens - 1).sum())
    return Speculation(
        steps=steps,
        new_tokens=drain.handed_over,
        mean_accepted_length=stepped / max(steps, 1),
        acceptance=[count / max(steps, 1) for count in state.accepted.tolist()],
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
    )
