"""Measuring ways of decoding one after another, within a budget: what all tables of generation share."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import generation_kernels, plots
from benchmarks.generation_floor import Floor, Multiplications, Reads, bound_seconds
from benchmarks.harness import (
    FAILURES,
    Sample,
    device_bandwidths,
    machine_name,
    product_rate,
    read_bandwidth,
    record,
    settings_of,
)
from benchmarks.pairs import Pair, random_text
from specc.bench import Row, Way, leading_equal, measure, same_text
from specc.runtime import workspace

SPECC = "specc"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of a table. ``kind``: whose way it is. ``drafts`` a step, by ``passes`` of the draft model."""

    kind: str
    way: Way
    drafts: int = 0
    passes: int = 0


@dataclasses.dataclass
class Result:
    """A measured cell. ``same``: who -> how many tokens from the start are theirs."""

    cell: Cell
    row: Row
    eps: float
    batch: int
    context: int
    floor: Floor
    floor_ms: float
    bound_ms: float
    same: dict[str, str]
    leading: dict[str, int]
    calls: dict[str, float]

    @property
    def share(self) -> float:
        """Of the floor."""
        return self.floor_ms / self.row.ms_per_step

    @property
    def host_ms(self) -> float | None:
        """Milliseconds per step in which the host did not wait, where the way tells."""
        seconds = self.row.facts.get("host_seconds")
        return None if seconds is None else 1e3 * seconds / max(self.row.steps.count, 1)

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.row.as_dict(),
            "kind": self.cell.kind,
            "drafts": self.cell.drafts,
            "draft_passes": self.cell.passes,
            "eps": self.eps,
            "batch": self.batch,
            "context": self.context,
            "floor": self.floor.as_dict(),
            "floor_ms": self.floor_ms,
            "bound_ms": self.bound_ms,
            "share_of_floor": self.share,
            "host_ms_per_step": self.host_ms,
            "leading_equal": self.leading,
            "runtime_calls": self.calls,
        }

    def line(self) -> str:
        row, peak = self.row, self.row.peak_bytes
        host = "" if self.host_ms is None else f"{self.host_ms:.2f}"
        nodes = row.facts.get("graph_nodes") or ""
        stops = f"{self.calls['synchronising_per_step']:.1f}" if self.calls else ""
        compiled, captured = (
            f"{row.first_facts[name]:.{digits}f}" if name in row.first_facts else ""
            for name, digits in (("compile_seconds", 1), ("capture_seconds", 2))
        )
        memory = "" if peak is None else f"{peak / 1e9:.1f}"
        accepted = " ".join(f"{each:.2f}" for each in row.steps.acceptance)
        return (
            f"{row.name:<28}{self.batch:5}{self.context:7}{self.eps:8.4f}{row.rate:9.1f}{row.decode.spread:7.1%}"
            f"{row.ms_per_step:9.3f}{row.steps.mean_accepted_length:8.2f}{self.floor_ms:9.3f}{self.share:6.0%}"
            f"{self.bound_ms:9.3f}{host:>8}{stops:>6}{nodes:>6}"
            f"{self.same.get('plain', ''):>10}{self.same.get('generate', ''):>10}"
            f"{row.warm_up:8.1f}{compiled:>8}{captured:>8}{memory:>7}  {accepted}"
        ).rstrip()


HEADER = (
    f"{'':28}{'batch':>5}{'contxt':>7}{'eps':>8}{'tok/s':>9}{'spread':>7}{'ms/step':>9}{'tok/step':>8}"
    f"{'floor ms':>9}{'of it':>6}{'bound ms':>9}{'host ms':>8}{'syncs':>6}{'nodes':>6}"
    f"{'= plain':>10}{'= HF':>10}"
    f"{'warm s':>8}{'compile':>8}{'capture':>8}{'GB':>7}  accepted per position"
)


class Run:
    """Measures until the budget is spent, printing each row and, if asked, saving all so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._start = time.monotonic()
        self.deadline = self._start + arguments.budget
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.bandwidths = _bandwidths(self.device)
        self.product_rate = product_rate(self.device, self.dtype)
        self.results: list[Result] = []
        self.failures: dict[str, str] = {}
        self.left_out: list[str] = []
        self.more: dict[str, Any] = {}
        self.pair = Pair(arguments.shape, self.device, self.dtype, arguments.seed, arguments.draft_layers)
        self.reads = Reads.of(self.pair.target), Reads.of(self.pair.draft)
        self._expected: dict[tuple[float, int, int, str], Tensor] = {}
        self._print_title()

    @property
    def bandwidth(self) -> float:
        """What floors are computed with: the fastest that was measured, so that no floor is too high."""
        return max(each.median for each in self.bandwidths.values())

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def inputs(self, batch: int, prompt: int) -> dict[str, Tensor]:
        text = random_text(self.pair.target, batch, prompt, seed=self.arguments.seed + 2)
        return {"input_ids": text, "attention_mask": torch.ones_like(text)}

    def measure(self, cell: Cell, batch: int, prompt: int, expected: str | None = None) -> Result | None:
        """Time a cell; None where it failed or the budget is over, which the record says.

        ``expected``: the name under which later cells of this eps, batch and prompt are compared with it.
        """
        eps, arguments = self.pair.eps, self.arguments
        label = f"{cell.way.name}, batch {batch}, prompt {prompt}, eps {eps:.4g}"
        if self.over():
            self.left_out.append(f"{label}: over budget")
            return None
        try:
            row = measure(cell.way, arguments.new_tokens, arguments.repeats, self.over, self.device)
            calls = self._calls(cell)
        except FAILURES as error:
            self.failures[label] = f"{type(error).__name__}: {str(error)[:400]}"
            print(f"{cell.way.name:<28} failed: {self.failures[label].splitlines()[0][:120]}", flush=True)
            self._clean()
            return None
        if expected is not None:
            self._expected[(eps, batch, prompt, expected)] = row.tokens
        result = self._result(cell, row, eps, batch, prompt, calls)
        self.results.append(result)
        print(result.line(), flush=True)
        self._clean()
        self.save()
        return result

    def _calls(self, cell: Cell) -> dict[str, float]:
        """The runtime's calls per step, of our own ways on a GPU."""
        if cell.kind != SPECC or self.device != "cuda":
            return {}
        return generation_kernels.calls_per_step(cell.way.prepare(), self.device)

    def _result(
        self, cell: Cell, row: Row, eps: float, batch: int, prompt: int, calls: dict[str, float]
    ) -> Result:
        # The text is this long in the middle of the decoding.
        context = prompt + row.tokens.shape[1] // 2
        step = {"batch": batch, "drafts": cell.drafts, "passes": cell.passes}
        floor, work = Floor.of(*self.reads, context=context, **step), Multiplications.of(*self.reads, **step)
        known = {
            name: tokens
            for (*place, name), tokens in self._expected.items()
            if tuple(place) == (eps, batch, prompt)
        }
        return Result(
            cell,
            row,
            eps,
            batch,
            context,
            floor,
            1e3 * floor.bytes / self.bandwidth,
            1e3 * bound_seconds(floor, work, self.bandwidth, self.product_rate.median),
            {name: same_text(row.tokens, tokens) for name, tokens in known.items()},
            {name: leading_equal(row.tokens, tokens) for name, tokens in known.items()},
            calls,
        )

    def save(self) -> None:
        arguments = self.arguments
        if arguments.output is None:
            return
        name = f"{machine_name(self.device)}_generation_{arguments.table}_{arguments.shape}{arguments.suffix}"
        content = {
            "benchmark": "generation",
            "table": arguments.table,
            "settings": settings_of(arguments),
            "dtype": str(self.dtype),
            "pair": {"shape": self.pair.name, "draft_layers": self.pair.draft_layers, "seed": self.pair.seed},
            "bandwidths": {key: each.as_dict() for key, each in self.bandwidths.items()},
            "floor_bandwidth": self.bandwidth,
            "product_rate": self.product_rate.as_dict(),
            "results": [each.as_dict() for each in self.results],
            "failures": self.failures,
            "left_out": self.left_out,
            "seconds": time.monotonic() - self._start,
            **self.more,
        }
        path = record(name, content, Path(arguments.output), arguments.commit)
        plots.draw(content, path.with_suffix(".png"))

    def _clean(self) -> None:
        # What specc keeps for its next call is no part of the next row's memory.
        workspace.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _print_title(self) -> None:
        speeds = ", ".join(f"{name} {each.median / 1e9:.0f} GB/s" for name, each in self.bandwidths.items())
        sizes = " and ".join(f"{each.weights / 1e9:.3f} GB" for each in self.reads)
        print(
            f"{self.arguments.table}: {self.pair.name} and its first {self.pair.draft_layers} layers, {sizes}"
        )
        rate = f"products {self.product_rate.median / 1e12:.1f} TFLOP/s"
        print(f"{machine_name(self.device)}, {self.dtype}, {speeds}, {rate}", flush=True)


def _bandwidths(device: str) -> dict[str, Sample]:
    if device == "cuda":
        return device_bandwidths()
    return {"read": read_bandwidth(repeats=3, megabytes=64)}
