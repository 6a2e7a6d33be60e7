"""Ways of decoding timed side by side, and ``specc bench``: a model's own ``generate`` against specc."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import specc
from specc import checks
from specc.errors import InputError
from specc.progress import stage

SHORT_CALLS = 3
# Enough for what runs eagerly on a CPU. On a GPU, attention may plan anew for each length of the text.
EAGER_WARM_UP = 8
NAME_WIDTH = 34


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


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of a call. ``mean_accepted_length``: tokens per step and row, bonus included, on average.

    ``acceptance[j]``: share of steps whose draft j + 1 was accepted.
    """

    count: int
    mean_accepted_length: float
    acceptance: tuple[float, ...] = ()

    @classmethod
    def plain(cls, new_tokens: int) -> Steps:
        """One token a step, the first of which comes from reading the prompt."""
        return cls(new_tokens - 1, 1.0)

    @classmethod
    def of(cls, emitted: Sequence[int], num_drafts: int) -> Steps:
        """From the number of tokens that each step gave."""
        count = max(len(emitted), 1)
        accepted = (sum(each > draft + 1 for each in emitted) / count for draft in range(num_drafts))
        return cls(len(emitted), sum(emitted) / count, tuple(accepted))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call gave. tokens: the new ones, int64 [B, N], on the CPU, so that the call has ended.

    ``steps`` and ``decode_seconds``, the call without reading the prompt: where the way tells them.
    """

    tokens: Tensor
    steps: Steps | None = None
    decode_seconds: float | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Call = Callable[[int], Outcome]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of decoding. ``prepare`` returns what makes a call of so many new tokens.

    ``count_steps`` makes a call that is not timed and returns its steps, where timed calls cannot.
    ``shortest``: the fewest new tokens the way can make; such a call is the reading of the prompt.
    ``warm_ups``: calls before all others, of ``warm_up_tokens``; None for as many as are timed.
    """

    name: str
    prepare: Callable[[], Call]
    count_steps: Callable[[int], Steps] | None = None
    shortest: int = 1
    warm_ups: int = 1
    warm_up_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A way, measured. Seconds are wall clock, a value per call; ``warm_up`` is what came before, in all.

    ``prompt``: what comes before the decoding, ``decode``: the rest. Both by the way's own clock where it
    has one; else a call of the fewest tokens is the prompt, and the fastest of these is taken off calls.
    ``facts``: what the way tells about the call of the median decoding, ``first_facts``: about its first,
    which may compile.
    """

    name: str
    tokens: Tensor
    steps: Steps
    warm_up: float
    prompt: Sample
    call: Sample
    decode: Sample
    decoded: int
    facts: Mapping[str, Any]
    first_facts: Mapping[str, Any]
    peak_bytes: int | None

    @property
    def rate(self) -> float:
        """Tokens per second of decoding, all rows together."""
        return self.decoded / self.decode.median

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.decode.median / max(self.steps.count, 1)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens_per_second": self.rate,
            "spread": self.decode.spread,
            "ms_per_step": self.ms_per_step,
            "steps": dataclasses.asdict(self.steps),
            "warm_up_seconds": self.warm_up,
            "prompt_seconds": self.prompt.as_dict(),
            "call_seconds": self.call.as_dict(),
            "decode_seconds": self.decode.as_dict(),
            "peak_bytes": self.peak_bytes,
            "facts": dict(self.facts),
            "first_facts": dict(self.first_facts),
        }


def measure(
    way: Way, new_tokens: int, repeats: int, over: Callable[[], bool] = lambda: False, device: str = "cpu"
) -> Row:
    """Warm up, then time ``repeats`` calls, fewer but one at least where ``over()`` says to stop."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call = way.prepare()
    warm_up_tokens = min(way.warm_up_tokens or new_tokens, new_tokens)
    warmed = [call(warm_up_tokens) for _ in range(way.warm_ups)]
    steps = None if way.count_steps is None else way.count_steps(new_tokens)
    warm_up = time.perf_counter() - start
    timed = [_timed(call, new_tokens)]
    while len(timed) < repeats and not over():
        timed.append(_timed(call, new_tokens))
    prompt, decode = _parted(way, call, timed)
    last = timed[-1][0]
    by_decoding = sorted(range(len(timed)), key=decode.__getitem__)
    typical = timed[by_decoding[(len(timed) - 1) // 2]][0]
    length = last.tokens.shape[1]
    return Row(
        name=way.name,
        tokens=last.tokens,
        steps=steps or last.steps or Steps.plain(length),
        warm_up=warm_up,
        prompt=Sample(tuple(prompt)),
        call=Sample(tuple(taken for _, taken in timed)),
        decode=Sample(tuple(decode)),
        decoded=last.tokens.shape[0] * (length - way.shortest),
        facts=typical.facts,
        first_facts=warmed[0].facts if warmed else {},
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def _parted(way: Way, call: Call, timed: list[tuple[Outcome, float]]) -> tuple[list[float], list[float]]:
    """Seconds of what comes before the decoding, and of it: by the way's clock, else by short calls."""
    known = [
        (outcome.decode_seconds, taken) for outcome, taken in timed if outcome.decode_seconds is not None
    ]
    if known:
        return [taken - decode for decode, taken in known], [decode for decode, _ in known]
    prompt = [_timed(call, way.shortest)[1] for _ in range(SHORT_CALLS)]
    # On a busy machine, a call of a few tokens can be faster than each reading of the prompt.
    return prompt, [max(taken - min(prompt), 1e-9) for _, taken in timed]


def _timed(call: Call, new_tokens: int) -> tuple[Outcome, float]:
    start = time.perf_counter()
    outcome = call(new_tokens)
    return outcome, time.perf_counter() - start


def leading_equal(tokens: Tensor, expected: Tensor) -> int:
    """How many tokens from the start are the same, in the row where that is fewest. int64 [B, N] each."""
    length = min(tokens.shape[1], expected.shape[1])
    same = (tokens[:, :length] == expected[:, :length]).long().cumprod(dim=1)
    return int(same.sum(dim=1).min())


def same_text(tokens: Tensor, expected: Tensor) -> str:
    """For a table: "yes", or how many tokens from the start are the same."""
    return "yes" if torch.equal(tokens, expected) else f"{leading_equal(tokens, expected)} first"


def hf_plain(model: Any, inputs: Mapping[str, Any], name: str = "generate", **settings: Any) -> Way:
    """The model's own ``generate``, with these settings."""
    warm_up_tokens = EAGER_WARM_UP if model.device.type == "cpu" else None
    return Way(name, lambda: _hf_call(model, inputs, settings), warm_up_tokens=warm_up_tokens)


def hf_lookup(model: Any, inputs: Mapping[str, Any], num_drafts: int, name: str) -> Way:
    """``generate`` with prompt lookup."""
    call = _hf_call(model, inputs, {"prompt_lookup_num_tokens": num_drafts})
    return _counting(model, inputs, call, num_drafts, name)


def hf_assisted(model: Any, inputs: Mapping[str, Any], draft: Any, num_drafts: int, name: str) -> Way:
    """``generate`` with an assistant that always drafts ``num_drafts`` tokens."""
    # The assistant's own config decides, and its defaults cut drafts short; the caller's stays as it is.
    assistant = copy.copy(draft)
    assistant.generation_config = copy.deepcopy(draft.generation_config)
    assistant.generation_config.update(
        num_assistant_tokens=num_drafts,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    call = _hf_call(model, inputs, {"assistant_model": assistant})
    return _counting(model, inputs, call, num_drafts, name)


def by_specc(model: Any, inputs: Mapping[str, Any], name: str, **settings: Any) -> Way:
    """``specc.generate``, with these settings."""

    def call(new_tokens: int) -> Outcome:
        output: Any = specc.generate(
            model,
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **settings,
        )
        went = output.speculation
        return Outcome(
            _new_tokens(output.sequences, inputs),
            Steps(went.batch_steps, went.mean_accepted_length, tuple(went.acceptance)),
            went.decode_seconds,
            dataclasses.asdict(went),
        )

    return Way(name, lambda: call)


def _counting(model: Any, inputs: Mapping[str, Any], call: Call, num_drafts: int, name: str) -> Way:
    def count(new_tokens: int) -> Steps:
        return _counted(model, inputs, call, new_tokens, num_drafts)

    # The call that counts is a whole one.
    return Way(name, lambda: call, count, warm_up_tokens=EAGER_WARM_UP)


def _hf_call(model: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> Call:
    def call(new_tokens: int) -> Outcome:
        sequences = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **settings)
        return Outcome(_new_tokens(sequences, inputs))

    return call


def _new_tokens(sequences: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    return sequences[:, inputs["input_ids"].shape[1] :].cpu()


def _counted(model: Any, inputs: Mapping[str, Any], call: Call, length: int, num_drafts: int) -> Steps:
    """Steps of an assisted call: between two forwards, the cache grows by what the first of them gave."""
    prompt = inputs["input_ids"].shape[1]
    with _cache_lengths(model) as lengths:
        made = call(length).tokens.shape[1]
    # Each token is in the cache once the next was chosen; the first forward reads the prompt as well.
    ends = [prompt - 1, *lengths[1:], prompt + made - 1]
    return Steps.of([after - before for before, after in itertools.pairwise(ends)], num_drafts)


@contextmanager
def _cache_lengths(model: Any) -> Iterator[list[int]]:
    """Collects how many tokens the cache holds at the start of each forward."""
    lengths: list[int] = []

    def note(_: Any, __: Any, arguments: Mapping[str, Any]) -> None:
        lengths.append(int(arguments["past_key_values"].get_seq_length()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


@dataclasses.dataclass(frozen=True)
class Task:
    """What ``specc bench`` compares. inputs: as tokenizers return them, [1, P], on the model's device.

    draft: "ngram" or a causal LM. blocks: the values of num_draft_tokens to try.
    """

    name: str
    model: Any
    inputs: Mapping[str, Any]
    draft: Any
    blocks: Sequence[int]
    max_new_tokens: int
    repeats: int
    options: Mapping[str, Any]

    @property
    def device(self) -> str:
        return self.model.device.type


@dataclasses.dataclass(frozen=True)
class Result:
    """The rows of a task; the first is the model's own generate. ``failures``: way -> what it raised."""

    task: Task
    rows: list[Row]
    failures: dict[str, str]

    @property
    def identical(self) -> bool:
        """Whether specc's tokens are those of the model's own generate."""
        ours = (row for row in self.rows if row.name.startswith("specc"))
        return all(torch.equal(row.tokens, self.rows[0].tokens) for row in ours)

    def table(self) -> str:
        lines = [self._title(), HEADER, *(self._line(row) for row in self.rows)]
        lines += [f"{name:<{NAME_WIDTH}}failed: {text}" for name, text in self.failures.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        expected = self.rows[0].tokens
        return {
            "model": self.task.name,
            "device": _device_name(self.task.device),
            "dtype": _dtype(self.task.model),
            "versions": {each.__name__: each.__version__ for each in (specc, torch, transformers)},
            "prompt_tokens": self.task.inputs["input_ids"].shape[1],
            "max_new_tokens": self.task.max_new_tokens,
            "options": dict(self.task.options),
            "rows": [
                {**row.as_dict(), "leading_equal": leading_equal(row.tokens, expected)} for row in self.rows
            ],
            "failures": self.failures,
        }

    def save(self, path: str) -> None:
        """Write the result as JSON. Raises InputError where that cannot be done."""
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}") from error

    def _title(self) -> str:
        prompt, new = self.task.inputs["input_ids"].shape[1], self.rows[0].tokens.shape[1]
        where = f"{_device_name(self.task.device)}, {_dtype(self.task.model)}"
        return f"{self.task.name} on {where}: {prompt} prompt tokens, {new} new, {self.task.repeats} repeats"

    def _line(self, row: Row) -> str:
        plain = self.rows[0]
        accepted = " ".join(f"{each:.2f}" for each in row.steps.acceptance)
        compiling = _number(row.first_facts.get("compile_seconds"), 1)
        host = _number(row.facts.get("host_seconds"), 3, 1e3 / max(row.steps.count, 1))
        nodes = row.facts.get("graph_nodes") or ""
        memory = _number(row.peak_bytes, 1, 1e-9)
        return (
            f"{row.name:<{NAME_WIDTH}}{row.rate:9.1f}{row.decode.spread:8.1%}{row.rate / plain.rate:7.2f}"
            f"{row.ms_per_step:9.2f}{row.steps.mean_accepted_length:12.2f}"
            f"{same_text(row.tokens, plain.tokens):>10}{row.prompt.median:10.3f}{row.warm_up:11.1f}"
            f"{compiling:>11}{host:>9}{nodes:>7}{memory:>7}  {accepted}"
        ).rstrip()


HEADER = (
    f"{'':{NAME_WIDTH}}{'tok/s':>9}{'spread':>8}{'ratio':>7}{'ms/step':>9}{'tokens/step':>12}{'same':>10}"
    f"{'prompt s':>10}{'warm-up s':>11}{'compile s':>11}{'host ms':>9}{'nodes':>7}{'GB':>7}"
    f"  accepted per position"
)


def run(task: Task, *, quiet: bool = False) -> Result:
    """Measure the task's ways. Where Hugging Face refuses to speculate, the result has the failure.

    Raises SpeccError for what specc refuses.
    """
    for block in task.blocks:
        checks.check_num_draft_tokens(block)
    rows = [_measured(task, hf_plain(task.model, task.inputs), quiet)]
    failures: dict[str, str] = {}
    for way in _peers(task):
        try:
            rows.append(_measured(task, way, quiet))
        except ValueError as error:
            failures[way.name] = str(error).strip().splitlines()[0]
    rows += [_measured(task, way, quiet) for way in _ours(task)]
    return Result(task, rows, failures)


def _measured(task: Task, way: Way, quiet: bool) -> Row:
    with stage(f"timing {way.name}", quiet=quiet):
        return measure(way, task.max_new_tokens, task.repeats, device=task.device)


def _peers(task: Task) -> list[Way]:
    return [_peer(task, block - 1) for block in dict.fromkeys(task.blocks) if block > 1]


def _ours(task: Task) -> list[Way]:
    """Plain decoding first: it is what speculation has to beat."""
    blocks = dict.fromkeys((1, *task.blocks))
    return [
        by_specc(
            task.model,
            task.inputs,
            f"specc, {block} a step",
            draft=task.draft if block > 1 else "ngram",
            num_draft_tokens=block,
            options=dict(task.options),
        )
        for block in blocks
    ]


def _peer(task: Task, num_drafts: int) -> Way:
    if isinstance(task.draft, str):
        return hf_lookup(task.model, task.inputs, num_drafts, f"generate, lookup of {num_drafts}")
    return hf_assisted(
        task.model, task.inputs, task.draft, num_drafts, f"generate, assistant of {num_drafts}"
    )


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """For a table; empty where nothing is known."""
    return "" if value is None else f"{scale * value:.{digits}f}"


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _device_name(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else kind
