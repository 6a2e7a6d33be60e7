"""Paged attention on a GPU: specc, stock attention over a static cache, FlexAttention, and the floor.

Keys and values are bfloat16, 8 KV heads of dimension 128. All rows of a call are equally long, their
pages scattered. Every time is one of CUDA graph replays (harness.device_seconds), over enough inputs
that none of them stays in the L2 cache. Peers get the same numbers of keys in their own layout:

    exact      SDPA over a cache of exactly the row's length, no mask: enable_gqa, from 2 tokens on with
               causal_lower_right. Stock code can do this only where all rows are equally long.
    masked     SDPA over a static cache as transformers calls it: repeat_kv, a bool mask [B, 1, q, L]
    masked gqa the same with enable_gqa instead of repeat_kv
    flex       FlexAttention's PagedAttention, compiled, pages of 128, for a few shapes

Without a GPU it rehearses itself on tiny shapes, and records nothing.

    python -m benchmarks.attention [--save] [--quick] [--budget 420] [--commit HASH]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.attention_calls import (
    Calls,
    Case,
    Pools,
    by_specc,
    exact,
    flex,
    kv_bytes,
    masked,
    num_sets,
    page_table_calls,
    relative_error,
)
from benchmarks.harness import (
    FAILURES,
    Sample,
    device_bandwidths,
    device_seconds,
    host_seconds,
    read_bandwidth,
    record,
)

# Batch and context; what matters most comes first, since the budget may end the run.
GRID = (
    *((1, 8192), (32, 8192), (8, 32768), (1, 32768), (8, 8192), (32, 32768), (1, 1024), (8, 1024)),
    *((1, 131072), (128, 8192), (8, 131072), (32, 1024), (128, 1024), (128, 32768), (32, 131072)),
    (128, 131072),
)
QUICK = GRID[:3]
FLEX = ((1, 8192), (32, 8192))
SMALL_PAGES = ((1, 8192), (32, 8192))
MOST_BYTES, CHECKED_BYTES = 60e9, 600e6
PEERS = ("exact", "masked", "masked gqa", "flex")


@dataclasses.dataclass
class Result:
    case: Case
    floor: float
    seconds: dict[str, Sample] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        times = {name: each.as_dict() for name, each in self.seconds.items()}
        return {
            **dataclasses.asdict(self.case),
            "floor_seconds": self.floor,
            "seconds": times,
            "failures": self.failures,
            "relative_error": self.error,
        }


class Run:
    """Measures case after case until the budget is spent, printing each and, if asked, saving all so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds = device_seconds if self.device == "cuda" else host_seconds
        self.arguments = arguments
        self.deadline = time.monotonic() + arguments.budget
        self.results: list[Result] = []
        self.left_out: list[str] = []
        self.page_tables: dict[str, Sample] = {}
        if self.device == "cuda":
            self.bandwidths = device_bandwidths()
        else:
            self.bandwidths = {"read": read_bandwidth(repeats=3, megabytes=64)}
        self.bandwidth = max(each.median for each in self.bandwidths.values())

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def grid(self) -> tuple[tuple[int, int], ...]:
        if self.device == "cpu":
            return ((1, 256), (2, 512))
        return QUICK if self.arguments.quick else GRID

    def attention(self, batch: int, context: int) -> None:
        """All cases of one batch and context, on one set of pools."""
        needed = kv_bytes(batch, context) * num_sets(kv_bytes(batch, context))
        if needed > MOST_BYTES or self.over:
            why = "over budget" if self.over else f"{needed / 1e9:.0f} GB of keys and values"
            self.left_out.append(f"batch {batch}, context {context}: {why}")
            return
        pools = Pools(batch, context, self.device)
        for case in _cases(batch, context):
            if self.over:
                self.left_out.append(f"{case}: over budget")
                continue
            result = Result(case, pools.kv_bytes / self.bandwidth)
            self.results.append(result)
            self._measure(result, pools)
            print(_line(result, self.results), flush=True)
        self.save()

    def _measure(self, result: Result, pools: Pools) -> None:
        for name, make in _ways(result.case).items():
            try:
                result.seconds[name] = self.seconds(make(result.case, pools))
                if name == "specc" and pools.kv_bytes <= CHECKED_BYTES:
                    result.error = relative_error(result.case, pools)
            except FAILURES as error:
                result.failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def measure_page_tables(self) -> None:
        """At 32 rows of 32768 tokens, pages of 64; repeated, since one takes a few microseconds."""
        context = 32768 if self.device == "cuda" else 256
        for name, calls in page_table_calls(32, context, 64, self.device).items():
            self.page_tables[name] = self.seconds(calls * 8)
            print(f"{name}: {_us(self.page_tables[name].median)} us, batch 32, context {context}, goal 5 us")

    def save(self) -> None:
        if not self.arguments.save or self.device == "cpu":
            return
        content = {
            "benchmark": "attention",
            "settings": vars(self.arguments),
            "bandwidths": {name: each.as_dict() for name, each in self.bandwidths.items()},
            "page_tables": {name: each.as_dict() for name, each in self.page_tables.items()},
            "results": [each.as_dict() for each in self.results],
            "left_out": self.left_out,
        }
        record("h200_attention", content, commit=self.arguments.commit)


def _cases(batch: int, context: int) -> list[Case]:
    shapes = [(64, 64), (32, 64)] + [(64, 16)] * ((batch, context) in SMALL_PAGES)
    return [Case(batch, context, heads, q, page) for heads, page in shapes for q in (1, 4, 8)]


def _ways(case: Case) -> dict[str, Callable[[Case, Pools], Calls]]:
    ways: dict[str, Callable[[Case, Pools], Calls]] = {"specc": by_specc}
    if case.page_size == 64:
        ways |= {"exact": exact, "masked": functools.partial(masked, repeat=True)}
        ways |= {"masked gqa": functools.partial(masked, repeat=False)}
        if (case.batch, case.context) in FLEX and case.heads == 64 and case.q_len != 4:
            ways["flex"] = flex
    return ways


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


HEADER = (
    f"{'batch':>5}{'context':>8}{'heads':>6}{'page':>5}{'q':>3}{'floor us':>10}{'specc us':>10}{'spread':>7}"
    f"{'of floor':>9}{'/decode':>8}" + "".join(f"{each:>11}" for each in PEERS)
)


def _line(result: Result, results: list[Result]) -> str:
    case, ours = result.case, result.seconds.get("specc")
    decode = next(each for each in results if each.case == dataclasses.replace(case, q_len=1))
    text = (
        f"{case.batch:5}{case.context:8}{case.heads:6}{case.page_size:5}{case.q_len:3}{_us(result.floor):>10}"
    )
    if ours is None:
        text += f"{'failed':>10}{'':24}"
    else:
        ratio = ours.median / decode.seconds["specc"].median if "specc" in decode.seconds else math.nan
        share = result.floor / ours.median
        text += f"{_us(ours.median):>10}{ours.spread:7.0%}{share:9.0%}{ratio:8.2f}"
    for peer in PEERS:
        text += f"{_peer(result, peer, ours):>11}"
    wrong = result.error is not None and not result.error < 1e-2
    return text + (f"  WRONG: relative error {result.error:.1e}" if wrong else "")


def _peer(result: Result, peer: str, ours: Sample | None) -> str:
    if peer in result.failures:
        return "failed"
    if peer not in result.seconds:
        return ""
    median = result.seconds[peer].median
    return f"{median / ours.median:.2f}x" if ours else _us(median)


def main() -> None:
    run = Run(_arguments())
    speeds = ", ".join(f"{name} {each.median / 1e12:.2f} TB/s" for name, each in run.bandwidths.items())
    print(f"{speeds}; a peer's column is its time over specc's\n{HEADER}")
    with torch.no_grad():
        try:
            run.measure_page_tables()
        except FAILURES as error:
            print(f"page tables: {error}")
        for batch, context in run.grid():
            run.attention(batch, context)
    reasons = {f"{name}: {why[:120]}" for each in run.results for name, why in each.failures.items()}
    print("\n".join([*run.left_out, *sorted(reasons)]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", action="store_true", help="record the results as JSON, after each shape")
    parser.add_argument("--quick", action="store_true", help="the three most important shapes only")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing new begins")
    parser.add_argument("--commit", help="for the record, where there is no git repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
