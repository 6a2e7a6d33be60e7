"""What is refused, before any work, with a sentence that says what to do; and what is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import specc
from specc.errors import InputError, OptionError, SpeccError, UnsupportedError
from tests.doors import (
    SETTINGS,
    SPECC,
    Recorder,
    plain,
    through_custom_generate,
    through_function,
)
from tests.families import VOCAB, noisy_copy, prompt, tiny

REFUSED = {
    "do_sample": True,
    "num_beams": 2,
    "num_return_sequences": 3,
    "output_scores": True,
    "output_logits": True,
    "use_cache": False,
    "prompt_lookup_num_tokens": 3,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "assistant_model": tiny("llama"),
    "past_key_values": object(),
    "cache_params": object(),
    "inputs_embeds": torch.zeros(1, 3, 32),
    "position_ids": torch.arange(12)[None],
    "prefix_allowed_tokens_fn": lambda batch, ids: [1],
    "synced_gpus": True,
    "cache_implementation": "offloaded",
    "labels": torch.zeros(1, 12, dtype=torch.int64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_one_sentence(name: str, forwards: list[Any]) -> None:
    with pytest.raises(SpeccError) as caught:
        through_function(1, **{name: REFUSED[name]})
    message = str(caught.value)
    assert message.count("\n") == 0
    assert ": " in message, "the sentence must say what to do instead"
    assert not forwards, "work was done before the refusal"


@pytest.mark.parametrize(("name", "value"), [("streamer", Recorder()), ("assistant_model", tiny("llama"))])
def test_custom_generate_refuses_what_it_would_lose(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=name):
        through_custom_generate(1, **{name: value})


@pytest.fixture
def forwards() -> Iterator[list[Any]]:
    """One entry for each forward of the model."""
    calls: list[Any] = []
    handle = tiny("llama").register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def _training() -> Any:
    return copy.deepcopy(tiny("llama")).train()


def _elsewhere() -> Any:
    model = copy.deepcopy(tiny("llama"))
    model.model.norm.to("meta")
    return model


def _other_vocabulary() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.families import COMMON

    return LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": 99})).eval()


def _short_context() -> Any:
    model = copy.deepcopy(noisy_copy("llama"))
    model.config.max_position_embeddings = 30
    return model


IDS = prompt(1)["input_ids"]
LEFT_OUT: Any = object()
BAD_INPUT: dict[str, tuple[dict[str, Any], type[SpeccError], str]] = {
    "draft missing": ({"draft": LEFT_OUT}, InputError, "draft is missing: pass draft='ngram'"),
    "draft None": ({"draft": None}, InputError, "draft is missing"),
    "unknown draft": ({"draft": "eagle9"}, InputError, "unknown draft 'eagle9'"),
    "draft is no model": ({"draft": torch.nn.Linear(2, 2)}, InputError, "the draft model must be a"),
    "vocabulary mismatch": ({"draft": _other_vocabulary}, InputError, "vocabulary of 99 .* of 128"),
    "draft in training mode": ({"draft": _training}, InputError, "draft model is in training mode"),
    "draft's context": ({"draft": _short_context}, InputError, "draft model's context is 30"),
    "no draft tokens": ({"num_draft_tokens": 0}, InputError, "from 1 to 64 .* got 0"),
    "too many draft tokens": ({"num_draft_tokens": 65}, InputError, "from 1 to 64 .* got 65"),
    "draft tokens no number": ({"num_draft_tokens": "4"}, InputError, "from 1 to 64 .* got '4'"),
    "empty prompt": ({"input_ids": IDS[:, :0]}, InputError, "the prompt is empty"),
    "no rows": ({"input_ids": IDS[:0]}, InputError, "the prompt is empty"),
    "empty row": ({"attention_mask": torch.zeros_like(IDS)}, InputError, "a prompt is empty"),
    "too long": ({"input_ids": IDS.repeat(1, 30)}, InputError, "360 tokens .* context is 256: shorten"),
    "wrong dtype": ({"input_ids": IDS.float()}, InputError, r"int64, got torch.float32: use .*long\(\)"),
    "3-D": ({"input_ids": IDS[None]}, InputError, r"2-D, \[batch, tokens\], got shape \[1, 1, 12\]"),
    "1-D": ({"input_ids": IDS[0]}, InputError, "2-D"),
    "a list": ({"input_ids": [1, 2]}, InputError, "tensor of token ids, got list"),
    "config is a dict": ({"generation_config": {}}, InputError, "a GenerationConfig, got dict"),
    "mask elsewhere": ({"attention_mask": IDS.to("meta")}, InputError, "attention_mask is on meta"),
    "outside the vocabulary": ({"input_ids": IDS + VOCAB}, InputError, r"vocabulary \(0 to 127\)"),
    "mask of another shape": ({"attention_mask": IDS[:, 1:]}, InputError, "attention_mask must have"),
    "right padding": (
        {"attention_mask": (torch.arange(12) < 9).long()[None]},
        InputError,
        "padded on the left",
    ),
    "other device": ({"input_ids": IDS.to("meta")}, InputError, "prompt is on meta"),
    "unknown option": ({"options": {"indcutor": True}}, OptionError, "'indcutor'; valid options: inductor"),
    "ill-typed option": ({"options": {"inductor": 1}}, OptionError, "must be True, False or None, got 1"),
    "unknown kv_dtype": ({"kv_dtype": "int8"}, InputError, "kv_dtype must be 'fp8' or None .* got 'int8'"),
    "kv_dtype is torch's": (
        {"kv_dtype": torch.float8_e4m3fn},
        InputError,
        "kv_dtype must be 'fp8' or None .* got torch.float8_e4m3fn",
    ),
    "empty chunks": (
        {"prefill_chunk_size": 0},
        UnsupportedError,
        "prefill_chunk_size=0: a prompt is read at least one token at a time: pass a positive",
    ),
    "compile no bool": ({"compile": "yes"}, InputError, "compile must be True or False"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, forwards: list[Any]) -> None:
    changes, error, message = BAD_INPUT[case]
    call: dict[str, Any] = {"input_ids": IDS, **SPECC, **SETTINGS, **changes}
    call = {name: value for name, value in call.items() if value is not LEFT_OUT}
    if callable(call.get("draft")) and not isinstance(call["draft"], torch.nn.Module):
        call["draft"] = call["draft"]()
    model = tiny("llama")
    before = (model.config.to_dict(), model.generation_config.to_dict(), set(vars(model)))
    with pytest.raises(error, match=message):
        specc.generate(model, **call)
    assert not forwards, "work was done before the refusal"
    assert (model.config.to_dict(), model.generation_config.to_dict(), set(vars(model))) == before
    assert torch.equal(through_function(1), plain(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_training, r"the model is in training mode: call model.eval\(\)"),
        (_elsewhere, "spread over cpu, meta"),
        (lambda: copy.deepcopy(tiny("llama")).to("meta"), "has no weights"),
        (lambda: torch.nn.Linear(2, 2), "must be a Hugging Face causal LM, got Linear"),
    ],
)
def test_models_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        specc.generate(make(), IDS, **SPECC, **SETTINGS)
    assert torch.equal(through_function(1), plain(1))


def test_an_assistant_on_another_device() -> None:
    with pytest.raises(InputError, match="the draft model is on meta and the model on cpu: move"):
        specc.generate(tiny("llama"), IDS, **{**SPECC, "draft": copy.deepcopy(tiny("llama")).to("meta")})


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
# Model class -> configuration, and what is said of it.
RECURRENT: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": (SMALL, "starts from a zero state"),
    "FalconMamba": (SMALL, "starts from a zero state"),
    "Jamba": (
        SMALL
        | HEADS
        | {"use_mamba_kernels": False, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        "starts from a zero state",
    ),
    "RecurrentGemma": (
        SMALL | HEADS | {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 16},
        "ignores the state",
    ),
    "Rwkv": (SMALL | {"attention_hidden_size": 32, "context_length": 64}, "roll back"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrences_that_cannot_be_verified_are_refused_by_name(name: str) -> None:
    settings, reason = RECURRENT[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with pytest.raises(UnsupportedError, match=f"the model .{name}ForCausalLM.*{reason}.*own generate"):
        specc.generate(model, IDS, **SPECC, **SETTINGS)
    with pytest.raises(UnsupportedError, match=f"the draft model .{name}.*{reason}"):
        specc.generate(tiny("llama"), IDS, **{**SPECC, "draft": model}, **SETTINGS)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_verify_graph_of_them_is_refused_too(name: str, fresh_compiler: None) -> None:
    """Instead of one that changes their states, or starts from none."""
    settings, reason = RECURRENT[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    verify = torch.compile(model, backend="specc", options={"mode": "verify", "inductor": False})
    with torch.no_grad(), pytest.raises(Exception, match=f"mode='verify': the model .*{reason}"):
        verify(IDS)


def test_models_that_build_their_own_masks_are_refused() -> None:
    """GPT-Neo slices a causal mask of its own by the length of the cache: it would be silently wrong."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    layers = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    model = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCAB, hidden_size=16, **layers)).eval()
    with pytest.raises(UnsupportedError, match="GPTNeoForCausalLM does not take its attention masks"):
        specc.generate(model, IDS, **SPECC, **SETTINGS)


def test_an_attention_implementation_without_a_mask_rule_is_refused() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="attn_implementation='flex_attention'.*'sdpa'"):
        specc.generate(model, IDS, **SPECC, **SETTINGS)


def test_nothing_is_streamed_before_a_refusal() -> None:
    """OPT asks its cache for one length, which only its forward shows: refused before the prompt is put."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, num_attention_heads=2, **shape)).eval()
    streamer = Recorder()
    with pytest.raises(UnsupportedError, match="asks its cache for one length"):
        specc.generate(model, IDS, **SPECC, **SETTINGS, streamer=streamer)
    assert (streamer.puts, streamer.ended) == ([], 0)


def test_models_without_positions_or_a_cache_are_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel, XLNetConfig, XLNetLMHeadModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=VOCAB, is_decoder=True, **shape)).eval()
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16))
    for model in (bert, xlnet.eval()):
        with pytest.raises(UnsupportedError, match="use the model's own generate"):
            specc.generate(model, IDS, **SPECC, **SETTINGS)
