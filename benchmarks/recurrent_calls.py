"""Steps of a stack of Gated DeltaNet layers, by specc and by its peers, for ``benchmarks.recurrent``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from specc.lowerings import REGISTRY

LAYERS, KEY_HEADS, HEADS, DIM = 24, 16, 32, 128
SCALE = DIM**-0.5
STATE_BYTES = HEADS * DIM * DIM * 4
# Of a record: u, and k and g of its heads.
RECORD_BYTES = HEADS * DIM * 4 + KEY_HEADS * DIM * 2 + HEADS * 4
# Of a token: q and k, v and o, g and beta.
TOKEN_BYTES = 2 * KEY_HEADS * DIM * 2 + 2 * HEADS * DIM * 2 + 2 * HEADS * 4

Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """``accepted`` of ``tokens`` are kept each step, in each of ``batch`` rows."""

    batch: int
    tokens: int
    accepted: int

    def ring_size(self, flush_every: int) -> int:
        return flush_every + 2 * self.tokens - 1

    def cycle(self, flush_every: int) -> int:
        """Steps after which flushes repeat."""
        return max(1, flush_every // self.accepted)

    def floor_bytes(self, flush_every: int) -> float:
        """What a step must at least move: states read once, their share of writes, records, the block."""
        writes = STATE_BYTES * min(1.0, self.accepted / flush_every)
        pending = sum(self.accepted * i % flush_every for i in range(self.cycle(flush_every)))
        pending_records = pending / self.cycle(flush_every) + self.accepted * (flush_every > 1)
        records = RECORD_BYTES * (pending_records + self.tokens)
        return LAYERS * self.batch * (STATE_BYTES + writes + records + TOKEN_BYTES * self.tokens)

    def two_pass_bytes(self) -> float:
        return LAYERS * self.batch * 2.0 * STATE_BYTES


class Layers:
    """States and inputs of all layers; inputs are shared by them, being small."""

    def __init__(self, case: Case, device: str, layers: int = LAYERS) -> None:
        self.case, self.device = case, device
        batch, tokens = case.batch, case.tokens

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        self.states = torch.zeros(layers, batch, HEADS, DIM, DIM, device=device)
        q, k = normal(batch, tokens, KEY_HEADS, DIM), normal(batch, tokens, KEY_HEADS, DIM)
        g = -torch.rand(batch, tokens, HEADS, device=device)
        beta = torch.rand(batch, tokens, HEADS, device=device)
        self.block = (q, k, normal(batch, tokens, HEADS, DIM), g, beta)


def snapshot(layers: Layers) -> list[Step]:
    """Every state on the way is stored; the accepted one is copied."""
    verify = REGISTRY["gated_delta_rule_snapshot"].overload
    commit = REGISTRY["commit_snapshots"].overload
    case, states = layers.case, list(layers.states)
    last = torch.full((case.batch,), case.accepted - 1, device=layers.device, dtype=torch.int32)

    def step() -> None:
        kept = [verify(*layers.block, state, None, SCALE, True)[1] for state in states]
        commit(states, kept, last, None, None, None)

    return [step]


def replay(layers: Layers, flush_every: int, exact: bool) -> list[Step]:
    """Whole cycles of flushes: base and lengths advance on the device, as they do for a runtime."""
    verify = REGISTRY["gated_delta_rule_replay"].overload
    case, count, device = layers.case, len(layers.states), layers.device
    size = case.ring_size(flush_every)
    ring_k = torch.zeros(count, case.batch, size, KEY_HEADS, DIM, device=device, dtype=torch.bfloat16)
    ring_u = torch.zeros(count, case.batch, size, HEADS, DIM, device=device)
    ring_g = torch.zeros(count, case.batch, size, HEADS, device=device)
    base, lens = torch.zeros(2, case.batch, device=device, dtype=torch.int64)

    def step() -> None:
        for i, state in enumerate(layers.states):
            rings = ring_k[i], ring_u[i], ring_g[i]
            verify(*layers.block, state, *rings, base, lens, lens, None, SCALE, True, flush_every, exact)
        base.add_((lens - base) // flush_every * flush_every)
        lens.add_(case.accepted)

    return [step] * case.cycle(flush_every)


def scratch_bytes(case: Case, flush_every: int | None) -> int:
    """Per request, all layers: the snapshots, or (``flush_every``) the rings."""
    if flush_every is None:
        return LAYERS * case.tokens * STATE_BYTES
    return LAYERS * case.ring_size(flush_every) * RECORD_BYTES


def recurrent(layers: Layers) -> list[Step]:
    """The plain recurrence by a Triton kernel: the state is read and written once; nothing can be dropped."""
    rule = REGISTRY["gated_delta_rule"].overload
    states = list(layers.states)

    def step() -> None:
        for i, state in enumerate(states):
            states[i] = rule(*layers.block, state, SCALE, True)[1]

    return [step]


def torch_path(layers: Layers) -> list[Step]:
    """What transformers calls without kernels: its recurrence for one token, its chunks for more."""
    from transformers.models.qwen3_next import modeling_qwen3_next as model

    one = layers.case.tokens == 1
    rule = model.torch_recurrent_gated_delta_rule if one else model.torch_chunk_gated_delta_rule
    # Its layers repeat keys and queries before they call.
    q, k = (x.repeat_interleave(HEADS // KEY_HEADS, 2) for x in layers.block[:2])
    # Where fla is installed, transformers puts it in the place of its own functions.
    return _peer(layers, inspect.unwrap(rule), (q, k, *layers.block[2:]))


def fla(layers: Layers) -> list[Step]:
    """flash-linear-attention's fused recurrence, where it is installed."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    return _peer(layers, fused_recurrent_gated_delta_rule, layers.block)


def _peer(layers: Layers, rule: Callable[..., object], block: tuple[Tensor, ...]) -> list[Step]:
    call = functools.partial(rule, *block, output_final_state=True, use_qk_l2norm_in_kernel=True)

    def step() -> None:
        for state in layers.states:
            call(initial_state=state)

    return [step]


def ways(case: Case) -> dict[str, Callable[[Layers], list[Step]]]:
    found: dict[str, Callable[[Layers], list[Step]]] = {
        "fast": functools.partial(replay, flush_every=16, exact=False),
        "exact": functools.partial(replay, flush_every=16, exact=True),
        "L = 1": functools.partial(replay, flush_every=1, exact=False),
        "L = 32": functools.partial(replay, flush_every=32, exact=False),
        "snapshot": snapshot,
    }
    if case.tokens == 1:
        found["recurrent"] = recurrent
    if case.accepted == case.tokens:
        found["torch"] = torch_path
        if importlib.util.find_spec("fla"):
            found["fla"] = fla
    return found
