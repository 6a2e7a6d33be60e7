"""What every benchmark shares: facts about the run, bandwidth, statistics, and the record it leaves."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from specc.bench import Sample
from specc.errors import SpeccError

RESULTS = Path(__file__).parent / "results"


def _failures() -> tuple[type[Exception], ...]:
    """What a peer that cannot do something raises; out of memory is a RuntimeError."""
    usual = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError)
    usual = (*usual, ImportError, OSError, SpeccError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return usual
    return (*usual, TritonError)


FAILURES = _failures()


def machine(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit, for the record; ``commit``: which one it is, where git cannot tell."""
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or _git("rev-parse", "HEAD"),
        "modified": not commit and bool(_git("status", "--porcelain", "--untracked-files=no")),
        **({"device": device()} if torch.cuda.is_available() else {}),
    }


def machine_name(device: str) -> str:
    """What records are called by: "cpu", or the GPU's last name."""
    return torch.cuda.get_device_name().split()[-1].lower() if device == "cuda" else "cpu"


def device() -> dict[str, Any]:
    """The GPU, its driver, and what compiles for it."""
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def read_bandwidth(repeats: int = 7, megabytes: int = 512) -> Sample:
    """Bytes per second at which this machine reads memory: the sum of an array far beyond its caches."""
    data = torch.ones(megabytes * 2**20 // 4)
    data.sum()
    return Sample(tuple(data.nbytes / _seconds(data.sum) for _ in range(repeats)))


def device_bandwidths(gigabytes: int = 4) -> dict[str, Sample]:
    """Bytes per second of the GPU's memory: read by a sum, and read and written by a copy."""
    source = torch.randn(gigabytes * 2**28, device="cuda")
    target = torch.empty_like(source)
    read, copy = device_seconds([source.sum]), device_seconds([lambda: target.copy_(source)])
    return {
        "read": Sample(tuple(source.nbytes / each for each in read.values)),
        "copy": Sample(tuple(2 * source.nbytes / each for each in copy.values)),
    }


def product_rate(device: str, dtype: torch.dtype) -> Sample:
    """Operations per second of a product of large square matrices, two for each multiplication."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    taken = (device_seconds if device == "cuda" else host_seconds)([lambda: a @ b])
    return Sample(tuple(2 * size**3 / each for each in taken.values))


def device_seconds(calls: Sequence[Callable[[], Any]], replays: int = 20, at_least: float = 1e-3) -> Sample:
    """Seconds per call on the GPU: the calls in turn, in one CUDA graph of ``at_least`` seconds, replayed.

    One value per replay, by events around it. The host is ahead of the GPU all along, so neither Python
    nor launching a graph counts; gaps between the kernels of a graph do. Give calls on several inputs to
    keep them from staying in the L2 cache.
    """
    _warm_up(calls)
    round_seconds = _replay_seconds(_captured(calls, 1), 2)[-1]
    rounds = min(math.ceil(at_least / round_seconds), max(1, 256 // len(calls)))
    taken = _replay_seconds(_captured(calls, rounds), replays + 3)[3:]
    return Sample(tuple(each / (rounds * len(calls)) for each in taken))


def _captured(calls: Sequence[Callable[[], Any]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _warm_up(calls: Sequence[Callable[[], Any]]) -> None:
    """Kernels are compiled and libraries' handles made before a capture, on a stream that is not it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()


def host_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 5) -> Sample:
    """Seconds per call on a CPU, the calls in turn."""
    calls[0]()
    return Sample(tuple(_seconds(lambda: [call() for call in calls]) / len(calls) for _ in range(repeats)))


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that one forward reads. Of an embedding not tied to the head it reads a few rows."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if tied else total - model.get_input_embeddings().weight.nbytes


# Arguments that name places on one machine.
PLACES = ("output", "gpt_fast", "vllm_folder")


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """A benchmark's arguments, for its record."""
    return {name: str(value) for name, value in vars(arguments).items() if name not in PLACES}


def record(name: str, content: dict[str, Any], folder: Path = RESULTS, commit: str | None = None) -> Path:
    """Write a result as ``<folder>/<name>.json``, with the facts of this run. ``commit``: see ``machine``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(commit), **content}, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _git(*arguments: str) -> str:
    return _output("git", *arguments)


def _output(*command: str) -> str:
    """What a command prints; empty where there is no such command."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
