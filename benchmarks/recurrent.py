"""A step of Gated DeltaNet layers on a GPU: by replay, by snapshots and by peers, and the floor.

24 layers, 16 key and 32 value heads of 128 x 128, float32 states, bfloat16 q, k, v. Every time is one of
CUDA graph replays (harness.device_seconds) per step of all layers, averaged over whole cycles of flushes.

    fast, exact    specc::gated_delta_rule_replay with a flush every 16 tokens
    L = 1          the same, fast, the state written every step
    L = 32         the same, fast, with a flush every 32 tokens, over cycles of its own
    snapshot       all states of a block stored, the accepted one copied (verify and commit)
    recurrent      specc's plain recurrence in Triton, one token only
    torch          what transformers calls without kernels (verify only)
    fla            flash-linear-attention's fused recurrence, where installed (verify only)

Without a GPU it rehearses itself on one layer, and records nothing.

    python -m benchmarks.recurrent [--save] [--quick] [--budget 200] [--commit HASH]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch

from benchmarks.harness import Sample, device_bandwidths, device_seconds, host_seconds, read_bandwidth, record
from benchmarks.recurrent_calls import LAYERS, Case, Layers, scratch_bytes, ways

# What matters most comes first, since the budget may end the run.
GRID = (
    *(Case(batch, 8, 8) for batch in (32, 64, 1, 8)),
    *(Case(batch, 1, 1) for batch in (32, 1, 64, 8)),
    *(Case(batch, tokens, tokens) for batch in (32, 1) for tokens in (4, 2)),
    Case(32, 8, 4),
    *(Case(batch, tokens, tokens) for batch in (64, 8) for tokens in (4, 2)),
    *(Case(batch, 8, 4) for batch in (64, 1, 8)),
)
COLUMNS = ("fast", "exact", "L = 1", "L = 32", "snapshot", "recurrent", "torch", "fla")
FLUSH_EVERY = 16


@dataclasses.dataclass
class Result:
    case: Case
    floor: float
    two_pass: float
    seconds: dict[str, Sample] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.case),
            "floor_seconds": self.floor,
            "two_pass_seconds": self.two_pass,
            "seconds": {name: each.as_dict() for name, each in self.seconds.items()},
            "failures": self.failures,
            "snapshot_bytes_per_request": scratch_bytes(self.case, None),
            "ring_bytes_per_request": scratch_bytes(self.case, FLUSH_EVERY),
        }


class Run:
    """Measures case after case until the budget is spent, printing each and, if asked, saving all so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.deadline = time.monotonic() + arguments.budget
        self.results: list[Result] = []
        self.left_out: list[str] = []
        self.cuda = torch.cuda.is_available()
        self.bandwidths = device_bandwidths() if self.cuda else {"read": read_bandwidth(3, 64)}
        self.bandwidth = self.bandwidths["read"].median

    def grid(self) -> tuple[Case, ...]:
        if not self.cuda:
            return (Case(1, 2, 2),)
        return GRID[:5] if self.arguments.quick else GRID

    def measure(self, case: Case) -> None:
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{case}: over budget")
            return
        floor = case.floor_bytes(FLUSH_EVERY) / self.bandwidth
        result = Result(case, floor, case.two_pass_bytes() / self.bandwidth)
        self.results.append(result)
        layers = Layers(case, "cuda" if self.cuda else "cpu", LAYERS if self.cuda else 1)
        for name, make in ways(case).items():
            try:
                steps = make(layers)
                result.seconds[name] = device_seconds(steps, replays=8) if self.cuda else host_seconds(steps)
            except (RuntimeError, ValueError, TypeError, LookupError, ImportError) as error:
                result.failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if self.cuda:
                torch.cuda.empty_cache()
        print(_line(result), flush=True)
        self.save()

    def save(self) -> None:
        if not self.arguments.save or not self.cuda:
            return
        content = {
            "benchmark": "recurrent",
            "settings": vars(self.arguments),
            "bandwidths": {name: each.as_dict() for name, each in self.bandwidths.items()},
            "results": [each.as_dict() for each in self.results],
            "left_out": self.left_out,
        }
        record("h200_recurrent", content, commit=self.arguments.commit)


HEADER = f"{'batch':>5}{'D':>3}{'kept':>5}{'floor':>8}{'2 passes':>9}" + "".join(
    f"{name:>11}" for name in (*COLUMNS, "of floor", "snap/fast", "MiB/request")
)


def _line(result: Result) -> str:
    case, times = result.case, {name: each.median * 1e3 for name, each in result.seconds.items()}
    text = (
        f"{case.batch:5}{case.tokens:3}{case.accepted:5}{result.floor * 1e3:8.3f}{result.two_pass * 1e3:9.3f}"
    )
    for name in COLUMNS:
        measured = f"{times[name]:.3f}" if name in times else ""
        text += f"{'failed' if name in result.failures else measured:>11}"
    if "fast" in times:
        text += f"{times['fast'] / result.floor / 1e3:11.2f}"
        text += f"{times.get('snapshot', float('nan')) / times['fast']:11.2f}"
    scratch = (scratch_bytes(case, FLUSH_EVERY), scratch_bytes(case, None))
    return text + f"{scratch[0] / 2**20:6.0f}/{scratch[1] / 2**20:.0f}"


def main() -> None:
    run = Run(_arguments())
    speeds = ", ".join(f"{name} {each.median / 1e12:.2f} TB/s" for name, each in run.bandwidths.items())
    print(f"{speeds}; ms a step of {LAYERS} layers; MiB a request: rings/snapshots\n{HEADER}")
    with torch.no_grad():
        for case in run.grid():
            run.measure(case)
    reasons = {f"{name}: {why[:160]}" for each in run.results for name, why in each.failures.items()}
    print("\n".join([*run.left_out, *sorted(reasons)]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", action="store_true", help="record the results as JSON, after each shape")
    parser.add_argument("--quick", action="store_true", help="the most important shapes only")
    parser.add_argument("--budget", type=float, default=200, help="seconds after which nothing new begins")
    parser.add_argument("--commit", help="for the record, where there is no git repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
