"""The three doors to one tiny model, and what its own generate says: shared by their tests."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation import (
    BaseStreamer,
    StoppingCriteria,
)

import specc
from tests.families import VOCAB, prompt, tiny

WIDTH = 12
SETTINGS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
SPECC: dict[str, Any] = {"draft": "ngram", "num_draft_tokens": 8, "compile": False}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[Any] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def characters() -> Any:
    """A tokenizer with one character for each token."""
    vocabulary = {chr(33 + i if i < 90 else 0x4E00 + i): i for i in range(VOCAB)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="!")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class AfterToken(StoppingCriteria):
    """Stops a row at its ``count``-th ``token``, and records what it was shown."""

    def __init__(self, token: int, count: int = 1) -> None:
        self.token, self.count = token, count
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return (input_ids[:, WIDTH:] == self.token).sum(dim=1) >= self.count


def plain(rows: int = 4, **settings: Any) -> Any:
    return tiny("llama").generate(**prompt(rows, WIDTH), **{**SETTINGS, **settings})


def through_function(rows: int = 4, **settings: Any) -> Any:
    return specc.generate(tiny("llama"), **prompt(rows, WIDTH), **{**SPECC, **SETTINGS, **settings})


def through_attach(rows: int = 4, **settings: Any) -> Any:
    model = specc.attach(tiny("llama"), **SPECC)
    try:
        return model.generate(**prompt(rows, WIDTH), **{**SETTINGS, **settings})
    finally:
        specc.detach(model)


def through_custom_generate(rows: int = 4, **settings: Any) -> Any:
    return tiny("llama").generate(
        **prompt(rows, WIDTH), custom_generate=specc.generate, **{**SPECC, **SETTINGS, **settings}
    )


DOORS = [through_function, through_attach, through_custom_generate]
FULL_DOORS = [through_function, through_attach]
