"""Seconds to the first token in a fresh process: with empty caches of compiled code, and with warm ones.

Target and draft are a pair of ``benchmarks.pairs``. Each row is a process of its own, which makes the
weights (not counted), calls specc.generate once and notes when its streamer gets the first token and when
the call ends: what a user waits for who has loaded a model. A second call shows what is left of it.
Both ways of compiling are tried, whole and by equal layers (``regional``), each with a cache of its own.

    python -m benchmarks.first_token [--shape llama-8b] [--regional on off] [--output results]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import specc
from benchmarks.harness import machine_name, record, settings_of
from benchmarks.pairs import SHAPES, Pair, random_text

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
NEW_TOKENS = 32
PROMPT = 128
ROW = "{name:24}{first:>14}{call:>12}{compiling:>12}{again:>12}{second:>12}"
TITLES = {
    "name": "",
    "first": "first token, s",
    "call": "call, s",
    "compiling": "compiling",
    "again": "1st, again",
    "second": "call, again",
}


class _Clock:
    """A streamer that notes when the first token after the prompt comes."""

    def __init__(self) -> None:
        self.puts = 0
        self.first = 0.0

    def put(self, _: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def timed_call(pair: Pair, num_drafts: int, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of one call of NEW_TOKENS: to its first token, in all, and what of it was compiling."""
    text, clock = random_text(pair.target, 1, PROMPT, seed=2), _Clock()
    start = time.perf_counter()
    output: Any = specc.generate(
        pair.target,
        input_ids=text,
        attention_mask=torch.ones_like(text),
        draft=pair.draft,
        num_draft_tokens=num_drafts + 1,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        options=options,
        streamer=clock,
        return_dict_in_generate=True,
    )
    return {
        "first_token": clock.first - start,
        "call": time.perf_counter() - start,
        "compiling": output.speculation.compile_seconds,
        "capturing": output.speculation.capture_seconds,
    }


def child(arguments: argparse.Namespace) -> None:
    """Two calls in this process, as one line of JSON."""
    device = _device()
    pair = Pair(arguments.shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    pair.set_eps(0.1)
    options = {**arguments.options, "regional": arguments.regional == ["on"]}
    first, second = (timed_call(pair, arguments.drafts, options) for _ in range(2))
    print(json.dumps({"first": first, "second": second}))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def row(arguments: argparse.Namespace, regional: str, folder: Path) -> dict[str, Any]:
    """What a child measures, its caches in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.first_token", "--child", "--shape", arguments.shape]
    command += ["--drafts", str(arguments.drafts), "--regional", regional]
    command += ["--options", json.dumps(arguments.options)]
    env = {**os.environ, **{name: str(folder / name.lower()) for name in CACHES}}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        child(arguments)
        return
    rows: list[dict[str, Any]] = []
    print(ROW.format(**TITLES), flush=True)
    for regional in arguments.regional:
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("empty", "warm"):
                found = row(arguments, regional, Path(folder))
                rows.append({"regional": regional == "on", "caches": caches, **found})
                print(_line(rows[-1]), flush=True)
                _save(arguments, rows)


def _line(row: dict[str, Any]) -> str:
    first, second = row["first"], row["second"]
    figures = {
        "first": first["first_token"],
        "call": first["call"],
        "compiling": first["compiling"],
        "again": second["first_token"],
        "second": second["call"],
    }
    name = f"{'equal layers once' if row['regional'] else 'whole'}, {row['caches']}"
    return ROW.format(name=name, **{key: f"{value:.2f}" for key, value in figures.items()})


def _save(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.output is None:
        return
    content = {
        "benchmark": "first_token",
        "settings": settings_of(arguments),
        "results": rows,
    }
    name = f"{machine_name(_device())}_first_token_{arguments.shape}{arguments.suffix}"
    record(name, content, Path(arguments.output), arguments.commit)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = "llama-8b" if _device() == "cuda" else "tiny-llama"
    parser.add_argument("--shape", choices=sorted(SHAPES), default=default, help=f"default {default}")
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--regional", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--options", type=json.loads, default={"exact": True}, metavar="JSON")
    parser.add_argument("--output", metavar="FOLDER", help="write JSON there")
    parser.add_argument("--suffix", default="", help="of the record's name")
    parser.add_argument("--commit", default="", help="for the record, where git is missing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
