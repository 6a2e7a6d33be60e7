"""Generation end to end: specc against what people decode with today, each row against its floor of bytes.

Target and draft have real shapes and random weights (benchmarks.pairs): the draft is the target's first
layers, and the target's other layers are scaled down by eps until both agree about as often as asked.
All ways run in this process, on the same weights, prompt and number of drafts; verification is real.

    peers      batch 1, K drafts, at several agreements: Hugging Face's modes, gpt-fast, flashspec, specc
    hybrid     the same on 24 Gated DeltaNet and 8 attention layers, where Hugging Face does not speculate
    growth     specc over batches and contexts
    kernels    where the microseconds of a step go, by kernel
    ablation   specc with parts of it switched off
    exact      10,000 tokens (24 on a CPU) with and without drafts, which must be the same
    options    what exact sums and compiling layers once cost a step

``ms/step`` and ``tok/s`` leave out reading the prompt: for specc by its own clock, for the others by
taking off the fastest of three calls of one token. ``of it`` is the floor's share of a step: weights,
draft weights per draft, keys and values, states and logits over the fastest bandwidth measured here.
``bound`` is the floor where products cannot be faster than large ones, which matters from many rows on.
``= plain`` compares tokens with specc's plain decoding, ``= HF`` with generate's. Rows that fail say why.
On a CPU it rehearses on tiny shapes in float32. ``--output`` writes JSON after each row, and a plot where
matplotlib is installed. A row that has begun is finished: leave the budget a minute or two of room.

    python -m benchmarks.generation peers --gpt-fast ../gpt-fast --budget 540 --output results
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import generation_kernels, generation_peers
from benchmarks.generation_ablation import with_graph_per_forward
from benchmarks.generation_gpt_fast import GptFast
from benchmarks.generation_runs import HEADER, SPECC, Cell, Result, Run
from benchmarks.harness import FAILURES
from specc.bench import Call, Way, by_specc, hf_assisted, hf_lookup, hf_plain
from specc.runtime import workspace

SHAPES = {"hybrid": "qwen3.5-9b"}
TINY = {"hybrid": "tiny-hybrid"}
PEERS = ("eager", "static", "kept", "assisted", "lookup", "gpt-fast", "flashspec")
# Without "static": compiling that forward can crash the process (seen on a CPU with torch 2.11), so it needs
# one of its own, by --peers static.
HYBRID_PEERS = ("eager", "assisted")
# What matters most comes first, since the budget may end the run.
GROWTH = (
    *((1, 1024), (16, 1024), (1, 16384), (64, 1024), (1, 65536), (4, 1024), (16, 4096)),
    *((4, 16384), (1, 4096), (4, 4096), (64, 4096), (4, 65536), (16, 16384)),
)
GROWTH_DRAFTS = 4
# Arguments of specc.generate. Each row switches on one more part than the row before.
GRAPH_PER_FORWARD = "a graph a forward, a sync a step"
ABLATION: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eager forwards", {"compile": False, "device_graph": "off", "steps_ahead": 1}),
    ("compiled, a sync a step", {"device_graph": "off", "steps_ahead": 1}),
    (GRAPH_PER_FORWARD, {"device_graph": "off", "steps_ahead": 1}),
    ("one graph a step", {"steps_ahead": 1}),
    ("2 steps queued", {"steps_ahead": 2}),
    ("4 steps queued", {"steps_ahead": 4}),
    ("8 steps queued", {"steps_ahead": 8}),
)
EXACT_BATCHES = (1, 16)
# So many tokens compile and capture what a call needs.
EXACT_WARM_UP = 32
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("exact", {"exact": True}),
    ("not exact", {"exact": False}),
    ("exact, compiled whole", {"exact": True, "regional": False}),
)


def peers(run: Run) -> None:
    """All at the first agreement and K; then what speed depends on these, specc first."""
    first, *other_drafts = run.arguments.drafts
    table = PeerTable(run)
    eps, *other_eps = _levels(run)
    table.at(eps)
    table.add(*table.plain())
    table.add(_specc(run, table.inputs, first), *table.speculative(first), *table.lookup(first))
    table.add(*(_specc(run, table.inputs, drafts) for drafts in other_drafts))
    for each in other_eps:
        table.at(each)
        table.add(*(_specc(run, table.inputs, drafts) for drafts in (0, *run.arguments.drafts)))
        table.add(*table.speculative(first))
    table.at(eps)
    for drafts in other_drafts:
        table.add(*table.speculative(drafts))
    table.print_ratios()


def growth(run: Run) -> None:
    """At eps 0, where nearly all drafts are right, so that rows stay about equally long.

    What a step costs does not depend on that.
    """
    run.pair.set_eps(0.0)
    drafts = GROWTH_DRAFTS
    print(HEADER, flush=True)
    for batch, prompt in _grid(run):
        needed = batch * prompt * sum(each.per_token for each in run.reads)
        if run.device == "cuda" and needed > 0.9 * torch.cuda.mem_get_info()[0]:
            run.left_out.append(f"batch {batch}, prompt {prompt}: {needed / 1e9:.0f} GB of keys and values")
            continue
        inputs = run.inputs(batch, prompt)
        if run.arguments.plain:
            run.measure(_specc(run, inputs, 0), batch, prompt, "plain")
        run.measure(_specc(run, inputs, drafts), batch, prompt)
    run.save()


def kernels(run: Run) -> None:
    """At the first agreement and K, of one batch: the unprofiled step, then its profile."""
    run.pair.set_eps(_levels(run)[0])
    prompt, drafts, batch = run.arguments.prompt, run.arguments.drafts[0], (run.arguments.batch or [1])[0]
    cell = _specc(run, run.inputs(batch, prompt), drafts)
    with generation_kernels.captured_products() as launches:
        result = run.measure(cell, batch, prompt)
        if result is None:
            return
        launches.clear()
        # Captured anew, which is when launches are taken down.
        workspace.reset()
        call = cell.way.prepare()
        call(run.arguments.new_tokens)
    try:
        found = generation_kernels.per_step(
            call, run.arguments.new_tokens, run.device, result.floor, run.bandwidth, launches
        )
    except FAILURES as error:
        run.failures["profile"] = f"{type(error).__name__}: {error}"
        print(f"the profile failed: {error}")
    else:
        run.more.update(found)
        print(generation_kernels.text(found, result.row.ms_per_step))
    run.save()


def ablation(run: Run) -> None:
    """At the first agreement and K."""
    run.pair.set_eps(_levels(run)[0])
    prompt, drafts = run.arguments.prompt, run.arguments.drafts[0]
    inputs = run.inputs(1, prompt)
    run.measure(_specc(run, inputs, 0), 1, prompt, "plain")
    for name, settings in ABLATION:
        cell = _specc(run, inputs, drafts, name, settings)
        if name == GRAPH_PER_FORWARD:
            cell = dataclasses.replace(cell, way=with_graph_per_forward(cell.way))
        run.measure(cell, 1, prompt)
    run.save()


def exact(run: Run) -> None:
    """At the first agreement and K: each row's tokens against those without drafts, to the last one."""
    run.pair.set_eps(_levels(run)[0])
    drafts = run.arguments.drafts[0]
    for batch in run.arguments.batch or EXACT_BATCHES:
        inputs = run.inputs(batch, run.arguments.prompt)
        for count, name, settings in (
            (0, None, {}),
            (drafts, None, {}),
            (drafts, "1 step at a time", {"steps_ahead": 1}),
        ):
            cell = _specc(run, inputs, count, name, {"options": {"exact": True}, **settings})
            cell = dataclasses.replace(cell, way=dataclasses.replace(cell.way, warm_up_tokens=EXACT_WARM_UP))
            run.measure(cell, batch, run.arguments.prompt, None if count else "plain")
    run.save()


def options(run: Run) -> None:
    """At the first agreement and K, and without drafts; all batches by one option, then by the next."""
    run.pair.set_eps(_levels(run)[0])
    prompt, drafts = run.arguments.prompt, run.arguments.drafts[0]
    for name, chosen in OPTIONS:
        for batch, count in itertools.product(run.arguments.batch or (1,), (0, drafts)):
            label = f"{name}, draft of {count}" if count else f"{name}, plain"
            run.measure(
                _specc(run, run.inputs(batch, prompt), count, label, {"options": chosen}), batch, prompt
            )
    run.save()


class PeerTable:
    """The rows of one prompt over all agreements, and how specc's compare with the others'."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs = run.inputs(1, run.arguments.prompt)
        self._results: list[Result] = []
        self._prepared: dict[str, Callable[[], Call]] = {}
        self._length = run.arguments.prompt + run.arguments.new_tokens
        usual = HYBRID_PEERS if run.arguments.table == "hybrid" else PEERS
        self._wanted = usual if run.arguments.peers is None else tuple(run.arguments.peers)
        self._gpt_fast = self._made_gpt_fast()

    def at(self, eps: float) -> None:
        """Set the agreement. gpt-fast has a copy of the weights, which change by that."""
        self.run.pair.set_eps(eps)
        if self._gpt_fast is not None:
            self._gpt_fast.load()

    def add(self, *cells: Cell) -> None:
        for cell in cells:
            names = {SPECC: "plain", "eager": "generate"}
            expected = names.get(cell.kind) if cell.drafts == 0 else None
            result = self.run.measure(cell, 1, self.run.arguments.prompt, expected)
            if result is not None:
                self._results.append(result)

    def plain(self) -> Iterator[Cell]:
        """specc's plain decoding and generate, which others are compared with, and other plain decoding."""
        pair, wanted = self.run.pair, self._wanted
        yield _specc(self.run, self.inputs, 0)
        if "eager" in wanted:
            yield Cell("eager", hf_plain(pair.target, self.inputs))
        if "static" in wanted:
            yield Cell("static", generation_peers.hf_static(pair, self.inputs))
        if "kept" in wanted:
            # As long as the cache that generate makes for itself: another length would compile again.
            yield Cell("kept", generation_peers.hf_static(pair, self.inputs, self._length - 1))
        if self._gpt_fast is not None:
            yield Cell("gpt-fast", self._gpt_fast.plain(self.inputs))

    def speculative(self, drafts: int) -> Iterator[Cell]:
        """The peers that draft with the pair's draft model."""
        pair, inputs = self.run.pair, self.inputs
        if self._gpt_fast is not None:
            yield Cell(
                "gpt-fast spec", self._kept(self._gpt_fast.speculative(inputs, drafts)), drafts, drafts
            )
        if "flashspec" in self._wanted:
            way = self._kept(generation_peers.flashspec(pair, inputs, drafts, self._length))
            yield Cell("flashspec", way, drafts, drafts)
        if "assisted" in self._wanted:
            name = f"generate, assistant of {drafts}"
            way = hf_assisted(pair.target, inputs, pair.draft, drafts, name)
            yield Cell("assisted", way, drafts, drafts)
        if "vllm" in self._wanted:
            folder, share = Path(self.run.arguments.vllm_folder), self.run.arguments.vllm_memory
            yield Cell("vllm", generation_peers.vllm(pair, inputs, drafts, folder, share), drafts, drafts)

    def lookup(self, drafts: int) -> Iterator[Cell]:
        """Prompt lookup, on a text that repeats itself only where the model does: what it costs."""
        if "lookup" not in self._wanted:
            return
        name = f"specc, lookup of {drafts}"
        yield Cell("specc lookup", _specc_way(self.run, self.inputs, name, "ngram", drafts), drafts)
        name = f"generate, lookup of {drafts}"
        yield Cell("lookup", hf_lookup(self.run.pair.target, self.inputs, drafts, name), drafts)

    def _kept(self, way: Way) -> Way:
        """With what it compiled at one agreement kept for the next: only weights change, in place."""
        if way.name not in self._prepared:
            self._prepared[way.name] = functools.cache(way.prepare)
        return dataclasses.replace(way, prepare=self._prepared[way.name])

    def _made_gpt_fast(self) -> GptFast | None:
        arguments = self.run.arguments
        if "gpt-fast" not in self._wanted:
            return None
        if arguments.gpt_fast is None:
            self.run.failures["gpt-fast"] = "no checkout was given: --gpt-fast PATH"
            return None
        try:
            return GptFast(Path(arguments.gpt_fast), self.run.pair, self._length, max(arguments.drafts))
        except FAILURES as error:
            self.run.failures["gpt-fast"] = f"{type(error).__name__}: {error}"
            return None

    def print_ratios(self) -> None:
        """tok/s of specc's rows over each peer's: at the same eps and K, or where these do not matter."""
        kinds = list(dict.fromkeys(each.cell.kind for each in self._results if each.cell.kind != SPECC))
        print("\n" + f"{'tok/s over':28}{'eps':>8}" + "".join(f"{kind:>14}" for kind in kinds))
        rows = []
        for ours in (each for each in self._results if each.cell.kind == SPECC):
            ratios = {kind: self._ratio(ours, kind) for kind in kinds}
            rows.append({"name": ours.row.name, "eps": ours.eps, "over": ratios})
            cells = "".join(f"{'' if each is None else f'{each:.2f}':>14}" for each in ratios.values())
            print(f"{ours.row.name:28}{ours.eps:8.4f}{cells}")
        self.run.more["ratios"] = rows
        self.run.save()

    def _ratio(self, ours: Result, kind: str) -> float | None:
        theirs = [each for each in self._results if each.cell.kind == kind]
        here = [each for each in theirs if each.eps == ours.eps and each.cell.drafts == ours.cell.drafts]
        # A peer that drafts nothing is as fast at any eps.
        found = here or [each for each in theirs if each.cell.drafts == 0]
        return ours.row.rate / found[0].row.rate if found else None


def _specc(
    run: Run, inputs: Any, drafts: int, name: str | None = None, settings: dict[str, Any] | None = None
) -> Cell:
    """specc with the pair's draft model, or its plain decoding where ``drafts`` is 0."""
    name = name or (f"specc, draft of {drafts}" if drafts else "specc, plain")
    draft = run.pair.draft if drafts else "ngram"
    return Cell(SPECC, _specc_way(run, inputs, name, draft, drafts, settings), drafts, drafts)


def _specc_way(
    run: Run, inputs: Any, name: str, draft: Any, drafts: int, settings: dict[str, Any] | None = None
) -> Way:
    given, settings = run.arguments.specc, settings or {}
    options = {**given.get("options", {}), **settings.get("options", {})}
    arguments = {**given, **settings, "options": options}
    return by_specc(run.pair.target, inputs, name, draft=draft, num_draft_tokens=drafts + 1, **arguments)


def _levels(run: Run) -> list[float]:
    """The eps asked for, or those at which the pair agrees as often as asked."""
    found = run.arguments.eps
    if found is None:
        found = [run.pair.set_agreement(agreement) for agreement in run.arguments.agreement]
        pairs = list(zip(run.arguments.agreement, found, strict=True))
        run.more["agreement"] = [{"agreement": asked, "eps": eps} for asked, eps in pairs]
        print(
            "agreement on a random text: " + ", ".join(f"{asked:g} at eps {eps:.4g}" for asked, eps in pairs)
        )
    print(HEADER, flush=True)
    return found


def _grid(run: Run) -> tuple[tuple[int, int], ...]:
    arguments = run.arguments
    grid = GROWTH if run.device == "cuda" else ((1, 16), (2, 32))
    kept = [
        (batch, prompt)
        for batch, prompt in grid
        if (not arguments.batch or batch in arguments.batch)
        and (not arguments.context or prompt in arguments.context)
    ]
    return tuple(kept[:2] if arguments.quick else kept)


TABLES: dict[str, Callable[[Run], None]] = {
    "peers": peers,
    "hybrid": peers,
    "growth": growth,
    "kernels": kernels,
    "ablation": ablation,
    "exact": exact,
    "options": options,
}


def main() -> None:
    arguments = _with_defaults(_arguments())
    run = Run(arguments)
    TABLES[arguments.table](run)
    for name, failure in run.failures.items():
        print(f"failed: {name}: {failure[:200]}")
    for each in run.left_out:
        print(f"left out: {each}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--shape", help="llama-8b, llama-1b, qwen3.5-9b or a tiny one")
    parser.add_argument("--draft-layers", type=int, help="layers of the draft; each shape has a default")
    parser.add_argument(
        "--drafts", type=int, nargs="+", help="K; what matters most first (default 5 3 4 6 7)"
    )
    parser.add_argument("--agreement", type=float, nargs="+", default=[0.7, 0.9, 0.5])
    parser.add_argument("--eps", type=float, nargs="+", help="instead of looking for agreements")
    parser.add_argument("--prompt", type=int, help="tokens (default 128)")
    parser.add_argument("--new-tokens", type=int, help="per call (default 128; exact: 10000)")
    parser.add_argument("--repeats", type=int, help="timed calls per row (default 5; exact: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=540, help="seconds until no more row is begun")
    parser.add_argument("--quick", action="store_true", help="one agreement, one K, two repeats")
    parser.add_argument("--peers", nargs="*", help=f"of {', '.join(PEERS)} and vllm")
    parser.add_argument("--gpt-fast", metavar="PATH", help="a checkout of gpt-fast at bc04265 or older")
    folder = str(Path(tempfile.gettempdir()) / "specc-pair")
    parser.add_argument("--vllm-folder", default=folder, help=f"where the pair is saved for vllm ({folder})")
    parser.add_argument("--vllm-memory", type=float, default=0.4, help="share of the GPU's memory for vllm")
    parser.add_argument("--batch", type=int, nargs="+", help="growth, exact, options, kernels: only these")
    parser.add_argument("--context", type=int, nargs="+", help="growth: only these")
    parser.add_argument("--plain", action="store_true", help="growth: plain decoding, too")
    parser.add_argument(
        "--specc",
        type=json.loads,
        default={},
        metavar="JSON",
        help='more arguments of specc.generate, such as {"options": {"exact": true}}',
    )
    parser.add_argument("--output", metavar="FOLDER", help="write JSON and a plot there")
    parser.add_argument("--suffix", default="", help="of the record's name")
    parser.add_argument("--commit", default="", help="for the record, where git is missing")
    return parser.parse_args()


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """What the table and the machine decide, where nothing was asked for."""
    table, cuda = arguments.table, torch.cuda.is_available()
    shapes, other = (SHAPES, "llama-8b") if cuda else (TINY, "tiny-llama")
    usual = {
        "shape": shapes.get(table, other),
        "drafts": [5, 3, 4, 6, 7] if cuda else [3, 2],
        "prompt": 128 if cuda else 16,
        "new_tokens": (10_000 if table == "exact" else 128) if cuda else 24,
        "repeats": 1 if table == "exact" else 5,
    }
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.quick:
        arguments.drafts, arguments.agreement = arguments.drafts[:1], arguments.agreement[:1]
        arguments.repeats = min(arguments.repeats, 2)
    return arguments


if __name__ == "__main__":
    main()
