"""What every benchmark shares: facts about the run, bandwidth, statistics, and the record it leaves."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the extremes, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "spread": self.spread, "values": list(self.values)}


def machine() -> dict[str, Any]:
    """Machine, versions and commit, for the record."""
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def read_bandwidth(repeats: int = 7, megabytes: int = 512) -> Sample:
    """Bytes per second at which this machine reads memory: the sum of an array far beyond its caches."""
    data = torch.ones(megabytes * 2**20 // 4)
    data.sum()
    return Sample(tuple(data.nbytes / _seconds(data.sum) for _ in range(repeats)))


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that one forward reads. Of an embedding not tied to the head it reads a few rows."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if tied else total - model.get_input_embeddings().weight.nbytes


def record(name: str, content: dict[str, Any]) -> Path:
    """Write a result as ``benchmarks/results/<name>.json``, with the facts of this run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
