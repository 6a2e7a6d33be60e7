"""Every kernel over small calls with edges, for compute-sanitizer: ``python -m tests.gpu.sanitized``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from specc.lowerings import REGISTRY, unified_attention
from specc.lowerings.triton_kernels import gluon_obstacle
from tests.attention_cases import Case, build
from tests.lowerings.gated_delta_calls import SHORT, Row, make_batch, make_block

BF16 = torch.bfloat16
ATTENTION = (
    Case(lens=(1, 513, 0, 64, 2049), blocks=(1, 8, 0, 5, 16), dtype=BF16, page=64),
    Case(lens=(700, 16), blocks=(1, 1), dtype=BF16, page=1, group=8, key_dim=128, value_dim=128),
    Case(lens=(700, 16), blocks=(4, 3), dtype=torch.float32, page=128, window=100, sinks=True),
    Case(lens=(300, 2), blocks=(8, 2), dtype=torch.float16, key_dim=192, value_dim=128, softcap=5.0),
    Case(lens=(300, 2), blocks=(8, 2), dtype=BF16, key_dim=80, value_dim=80, group=7, spare_pages=0),
    Case(lens=(300, 2), blocks=(300, 2), dtype=BF16, key_dim=256, value_dim=256, group=1),
    Case(lens=(5000, 16), blocks=(8, 1), dtype=BF16, fp8=True, key_dim=128, value_dim=128, spare_pages=0),
)


def one_token(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return *(each[:, :1].contiguous() for each in call[:5]), *call[5:]


def calls(name: str, sample: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The sample, and what other kernels of the same operator serve."""
    yield sample
    if name == "gated_delta_rule_replay":
        for exact in (False, True):
            call = *sample[:-1], exact
            yield call
            yield one_token(call)


def replay_in_accumulators() -> None:
    """By all tiles, some of which the operator chooses for more rows than it takes to find a bad access."""
    if gluon_obstacle() is not None:
        return
    from specc.lowerings.triton_kernels import gated_delta_gluon

    rows = [Row(7, 20), Row(padding=True), Row(0, 16, 5), Row(padding=True)]
    there = make_batch(SHORT, rows, [4, 1, 0, 2]).to("cuda")
    rings = there.pool.tensors()[1:]
    lens = there.pool.base, there.seq_lens, there.final_lens, there.slots
    for tokens, tiles in itertools.product((3, 8), gated_delta_gluon.TILES.values()):
        block = make_block(SHORT, len(rows), tokens, "cuda")
        gated_delta_gluon.replay(block, there.pool.state, rings, lens, SHORT.scale, True, 16, tiles)


def main() -> None:
    for case in ATTENTION:
        unified_attention(*build(case, "cuda"))
    for op in REGISTRY.values():
        for call in calls(op.name, op.sample("cuda")):
            for provider in op.providers:
                if provider.name == "triton" and provider.supports(*call) is None:
                    provider.run(*call)
    replay_in_accumulators()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
