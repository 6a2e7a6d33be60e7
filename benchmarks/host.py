"""The host's own work of a step, with a stand-in for the device, which answers at once.

``warm`` is one step after the other; ``cold`` touches more memory than caches hold wherever the host would
wait for the device, for that is how it finds them after milliseconds. Launching, copies and events of a real
device are not in it.

    python -m benchmarks.host [--rows 1 16 64] [--steps 200] [--repeats 5] [--save]
"""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from benchmarks.harness import Sample, machine_name, record, settings_of
from specc.runtime.device_graph import EagerGraph
from specc.runtime.drain import Drain
from specc.runtime.session import _Loop

BLOCK, COMMITTED = 6, 3
PROMPT = 128
BEYOND_CACHES = 48 << 20
CACHE_LINE = 64


class Link:
    """Every step commits some tokens in each row; waiting for it costs the caches, if asked."""

    steps_ahead = 2

    def __init__(self, rows: int, cold: bool) -> None:
        row = [COMMITTED - 1, COMMITTED, *range(100, 100 + BLOCK)]
        self._report = torch.tensor([row] * rows)
        self._others = torch.zeros(BEYOND_CACHES if cold else 0, dtype=torch.uint8)

    def expect(self, report: Tensor, count: int) -> None: ...

    def send(self, report: Tensor) -> None: ...

    def discard(self) -> None: ...

    def wait(self) -> None:
        self._others[::CACHE_LINE] += 1

    def receive(self) -> list[list[int]]:
        return self._report.tolist()

    def upload(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    cold: bool
    eos: bool

    def seconds(self, steps: int) -> float:
        """Of a step, without what the host waited."""
        new_tokens, device = steps * COMMITTED, torch.device("cpu")
        criteria = StoppingCriteriaList([MaxLengthCriteria(PROMPT + new_tokens)])
        if self.eos:
            criteria.append(EosTokenCriteria([7, 8]))
        link, graph = Link(self.rows, self.cold), EagerGraph(device)
        graph.capture(lambda: None)
        flags = torch.zeros(2, self.rows, dtype=torch.bool)
        report = torch.zeros(self.rows, 2 + BLOCK, dtype=torch.int64)
        state = SimpleNamespace(report=report, stopped=flags[0], done=flags[1])
        prompts = torch.ones(self.rows, PROMPT, dtype=torch.int64)
        space: Any = SimpleNamespace(state=state, link=link, graph=graph)
        batch: Any = SimpleNamespace(live=self.rows, lens=torch.full((self.rows,), PROMPT))
        request: Any = SimpleNamespace(num_draft_tokens=BLOCK, steps_ahead=None)
        drain = Drain(prompts, new_tokens, criteria, 0, None, link)
        loop = _Loop(space, batch, drain, request)
        loop.run()
        return (loop.seconds - loop.waited) / loop.tally.batch_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(f"us a step of {COMMITTED} tokens a row: median (spread)")
    for rows in arguments.rows:
        for cold in (False, True):
            for eos in (False, True):
                case = Case(rows, cold, eos)
                found = Sample(tuple(case.seconds(arguments.steps) for _ in range(arguments.repeats)))
                results.append({**dataclasses.asdict(case), "seconds": found.as_dict()})
                caches, asked = "cold" if cold else "warm", "EOS" if eos else ""
                print(f"{rows:4} rows  {caches}  {asked:4}{1e6 * found.median:8.1f} ({found.spread:.0%})")
    if arguments.save:
        content = {"benchmark": "host", "settings": settings_of(arguments), "results": results}
        record(f"{machine_name('cpu')}_host", content)


if __name__ == "__main__":
    main()
