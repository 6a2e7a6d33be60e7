"""One prompt through ``specc.generate`` and through the model's own ``generate``, timed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TextStreamer

import specc
from specc.progress import stage

WARM_UP_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Task:
    """What to generate. ``inputs``: input_ids int64 [1, P] and attention_mask, as tokenizers return them."""

    model: Any
    tokenizer: Any
    inputs: dict[str, Any]
    draft: Any
    num_draft_tokens: int
    max_new_tokens: int
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One generation. ``seconds`` is wall clock, reading the prompt included, compiling left out."""

    tokens: list[int]
    seconds: float
    speculation: Any = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``streamed`` compiled on its way; ``timed`` is the same run again, and ``plain`` the model's own."""

    num_draft_tokens: int
    streamed: Run
    timed: Run
    plain: Run

    @property
    def identical(self) -> bool:
        return self.streamed.tokens == self.timed.tokens == self.plain.tokens

    def table(self) -> str:
        accepted = self.timed.speculation.mean_accepted_length
        rows = [
            ("tokens", str(len(self.timed.tokens))),
            ("tokens per second", f"{self.timed.tokens_per_second:.1f}"),
            ("mean accepted length", f"{accepted:.2f} of {self.num_draft_tokens}"),
            ("plain tokens per second", f"{self.plain.tokens_per_second:.1f}"),
            ("ratio", f"{self.timed.tokens_per_second / self.plain.tokens_per_second:.2f}"),
            (
                "compile seconds",
                f"{self.streamed.speculation.compile_seconds:.1f} (first run, not in the speed)",
            ),
            ("identical", "yes" if self.identical else "no"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def stream(task: Task, *, quiet: bool) -> Run:
    """Generate with specc, printing the text to stdout as it comes."""
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(stage("reading the prompt and compiling", quiet=quiet))
        return _speculate(task, streamer=_StageStreamer(task.tokenizer, waiting))


def summary(run: Run) -> str:
    return (
        f"specc: {len(run.tokens)} tokens, {run.tokens_per_second:.1f} per second, "
        f"{run.speculation.mean_accepted_length:.2f} per step; "
        f"compiling took {run.speculation.compile_seconds:.1f} s more"
    )


def compare(task: Task, streamed: Run, *, quiet: bool) -> Comparison:
    """Time specc again, now that it has compiled, then the model's own ``generate``."""
    with stage("timing specc", quiet=quiet):
        timed = _speculate(task)
    with stage("timing plain decoding", quiet=quiet):
        _plain(task, WARM_UP_TOKENS)
        plain = _plain(task, task.max_new_tokens)
    return Comparison(task.num_draft_tokens, streamed, timed, plain)


def _speculate(task: Task, streamer: Any = None) -> Run:
    output, seconds = _timed(
        lambda: specc.generate(
            task.model,
            **task.inputs,
            draft=task.draft,
            num_draft_tokens=task.num_draft_tokens,
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            streamer=streamer,
            return_dict_in_generate=True,
            options=task.options,
        )
    )
    speculation = output.speculation
    return Run(_new_tokens(task, output.sequences), seconds - speculation.compile_seconds, speculation)


def _plain(task: Task, max_new_tokens: int) -> Run:
    sequences, seconds = _timed(
        lambda: task.model.generate(**task.inputs, max_new_tokens=max_new_tokens, do_sample=False)
    )
    return Run(_new_tokens(task, sequences), seconds)


def _new_tokens(task: Task, sequences: Tensor) -> list[int]:
    return sequences[0, task.inputs["input_ids"].shape[1] :].tolist()


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


class _StageStreamer(TextStreamer):
    """Prints text as it comes, behind the line of the stage that waits for it.

    The first token comes from reading the prompt, the second from the compiled step: until then the
    stage's line is open, and text is held back.
    """

    def __init__(self, tokenizer: Any, waiting: contextlib.ExitStack) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._waiting = waiting
        self._puts_to_wait_for = 3
        self._held = ""

    def put(self, value: Tensor) -> None:
        self._puts_to_wait_for -= 1
        if self._puts_to_wait_for == 0:
            self._waiting.close()
        super().put(value)

    def end(self) -> None:
        self._waiting.close()
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held += text
        if stream_end or self._puts_to_wait_for <= 0:
            super().on_finalized_text(self._held, stream_end)
            self._held = ""
