"""The three doors and generate's contract: streamers, criteria, outputs, what is refused and how."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteria,
)

import specc
from specc.errors import InputError, OptionError, ProviderError, SpeccError, UnsupportedError
from tests.families import VOCAB, noisy_copy, prompt, tiny

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


@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_plain_tokens(door: Any) -> None:
    assert torch.equal(door(), plain())
    settings = {"eos_token_id": int(plain()[1, WIDTH + 5]), "pad_token_id": 0, "min_new_tokens": 3}
    assert torch.equal(door(**settings), plain(**settings))


def test_custom_generate_with_everything_bound() -> None:
    bound = functools.partial(specc.generate, **SPECC)
    tokens = tiny("llama").generate(**prompt(2), custom_generate=bound, **SETTINGS)
    assert torch.equal(tokens, tiny("llama").generate(**prompt(2), **SETTINGS))


def test_the_prompt_may_be_positional_or_named() -> None:
    ids = prompt(1)["input_ids"]
    expected = tiny("llama").generate(ids, **SETTINGS)
    assert torch.equal(specc.generate(tiny("llama"), ids, **SPECC, **SETTINGS), expected)
    assert torch.equal(specc.generate(tiny("llama"), inputs=ids, **SPECC, **SETTINGS), expected)
    assert torch.equal(specc.generate(tiny("llama"), input_ids=ids, **SPECC, **SETTINGS), expected)


def test_a_compiled_model_is_unwrapped() -> None:
    wrapped = torch.compile(tiny("llama"), backend="specc")
    assert torch.equal(specc.generate(wrapped, **prompt(2), **SPECC, **SETTINGS), plain(2))


def test_a_generation_config_is_followed_and_left_alone() -> None:
    config = GenerationConfig(max_new_tokens=23, do_sample=False, eos_token_id=None)
    before = config.to_dict()
    tokens = specc.generate(tiny("llama"), **prompt(2), **SPECC, generation_config=config)
    assert torch.equal(tokens, tiny("llama").generate(**prompt(2), generation_config=config))
    assert config.to_dict() == before


@pytest.mark.parametrize("door", DOORS)
def test_return_dict(door: Any) -> None:
    output = door(return_dict_in_generate=True)
    assert isinstance(output, specc.SpeccOutput)
    assert torch.equal(output.sequences, plain())
    assert output.speculation.steps > 0
    assert len(output.speculation.acceptance) == 7


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("door", FULL_DOORS)
def test_a_streamer_gets_what_plain_decoding_would_put(door: Any, rows: int) -> None:
    ours, theirs = Recorder(), Recorder()
    settings = {"eos_token_id": int(plain(rows)[0, WIDTH + 20]), "pad_token_id": 0}
    tokens = door(rows, streamer=ours, **settings)
    assert torch.equal(tokens, plain(rows, streamer=theirs, **settings))
    assert ours.puts == theirs.puts
    assert ours.ended == theirs.ended == 1


@pytest.mark.parametrize("place", range(1, 10))
@pytest.mark.parametrize("door", DOORS)
def test_user_criteria_see_every_token(door: Any, place: int) -> None:
    """A model drafting for itself has blocks of 8 accepted: the stop lies inside one."""
    token = int(plain(1)[0, WIDTH + place])
    ours, theirs = AfterToken(token), AfterToken(token)
    tokens = door(1, stopping_criteria=[ours], draft=tiny("llama"))
    assert torch.equal(tokens, plain(1, stopping_criteria=[theirs]))
    assert ours.seen == theirs.seen


@pytest.mark.parametrize("eos", [None, 99])
def test_user_criteria_on_a_ragged_batch(eos: int | None) -> None:
    """With an EOS criterion, rows that stop are padded; without one they go on until all have stopped."""
    token = int(plain()[2, WIDTH + 6])
    settings = {"eos_token_id": eos, "pad_token_id": 0}
    ours, theirs = AfterToken(token, 2), AfterToken(token, 2)
    tokens = through_function(stopping_criteria=[ours], **settings)
    assert torch.equal(tokens, plain(stopping_criteria=[theirs], **settings))
    assert ours.seen == theirs.seen


def test_a_users_length_criterion_takes_the_place_of_the_configs() -> None:
    for length in (20, 70):
        settings = {"stopping_criteria": [MaxLengthCriteria(max_length=length)]}
        assert torch.equal(through_function(**settings), plain(**settings))


@pytest.mark.parametrize("place", [3, 6, 9])
@pytest.mark.parametrize("door", FULL_DOORS)
def test_stop_strings_in_the_middle_of_a_block(door: Any, place: int) -> None:
    tokenizer = characters()
    text = tokenizer.decode(plain(1)[0, WIDTH:])
    settings = {"stop_strings": [text[place : place + 2]], "tokenizer": tokenizer}
    tokens = door(1, draft=tiny("llama"), **settings)
    assert torch.equal(tokens, plain(1, **settings))
    assert tokens.shape[1] < WIDTH + 40


def test_stop_strings_of_the_models_own_config() -> None:
    model, tokenizer = copy.copy(tiny("llama")), characters()
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.stop_strings = [tokenizer.decode(plain(1)[0, WIDTH + 4 : WIDTH + 6])]
    before = model.generation_config.to_dict()
    tokens = specc.generate(model, **prompt(1), **SPECC, **SETTINGS, tokenizer=tokenizer)
    assert torch.equal(tokens, model.generate(**prompt(1), **SETTINGS, tokenizer=tokenizer))
    assert model.generation_config.to_dict() == before
    with pytest.raises(InputError, match="tokenizer="):
        specc.generate(model, **prompt(1), **SPECC, **SETTINGS)


@pytest.mark.parametrize("config_eos", [None, 99])
def test_a_users_processor_holds_back_its_own_ids(config_eos: int | None) -> None:
    early = int(plain(1)[0, WIDTH + 2])
    processor = MinLengthLogitsProcessor(WIDTH + 13, eos_token_id=torch.tensor([early]))
    settings = {"eos_token_id": config_eos, "pad_token_id": 0, "logits_processor": [processor]}
    assert not torch.equal(plain(1, **settings), plain(1))
    assert torch.equal(through_function(1, **settings), plain(1, **settings))


def test_a_users_eos_criterion_is_not_held_back_by_the_configs_minimum() -> None:
    early = int(plain(1)[0, WIDTH + 2])
    criteria = [EosTokenCriteria(torch.tensor([early]))]
    settings = {"eos_token_id": 99, "pad_token_id": 0, "min_new_tokens": 15, "stopping_criteria": criteria}
    assert torch.equal(through_function(1, **settings), plain(1, **settings))


@pytest.mark.parametrize("eos", [500, -1])
def test_eos_ids_that_are_no_tokens(eos: int) -> None:
    settings = {"eos_token_id": eos, "pad_token_id": 0, "min_new_tokens": 5}
    assert torch.equal(through_function(**settings), plain(**settings))


class SecondEos(EosTokenCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, WIDTH:], self.eos_token_id).sum(dim=1) >= 2


def test_a_criterion_that_only_looks_like_eos() -> None:
    eos = torch.tensor([int(plain(1)[0, WIDTH + 2])])
    settings = {"eos_token_id": int(eos), "pad_token_id": 0, "stopping_criteria": [SecondEos(eos)]}
    assert torch.equal(through_function(1, **settings), plain(1, **settings))


@pytest.mark.parametrize("length", [5, WIDTH, WIDTH + 1])
def test_a_length_criterion_no_longer_than_the_prompt_gives_one_token(length: int) -> None:
    settings = {"stopping_criteria": [MaxLengthCriteria(max_length=length)]}
    assert torch.equal(through_function(**settings), plain(**settings))


@pytest.mark.parametrize("convert", [lambda m: m * 2, lambda m: m.bool(), lambda m: m.float()])
def test_masks_of_other_kinds(convert: Any) -> None:
    inputs = prompt(4, WIDTH)
    inputs["attention_mask"] = convert(inputs["attention_mask"])
    assert torch.equal(specc.generate(tiny("llama"), **inputs, **SPECC, **SETTINGS), plain())


def test_a_model_whose_forward_is_compiled_already(fresh_compiler: None) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.forward = torch.compile(model.forward, backend="eager")
    compiled = model.forward
    draft = torch.compile(copy.deepcopy(noisy_copy("llama")), backend="eager")
    for compile in (False, True):
        call = {**SPECC, **SETTINGS, "compile": compile, "options": {"inductor": False}}
        for each in ("ngram", draft):
            assert torch.equal(specc.generate(model, **prompt(4), **{**call, "draft": each}), plain())
    assert model.forward is compiled


def test_attach_to_a_compiled_model() -> None:
    inner = copy.deepcopy(tiny("llama"))
    model = torch.compile(inner, backend="eager")
    specc.attach(model, **SPECC)
    output = model.generate(**prompt(4), **SETTINGS, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain())
    assert output.speculation.steps > 0
    specc.detach(model)
    assert "generate" not in vars(inner)


def test_a_copy_of_an_attached_model_has_its_own_weights() -> None:
    model = specc.attach(copy.deepcopy(tiny("llama")), **SPECC)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    tokens = other.generate(**prompt(2), **SETTINGS)
    assert torch.equal(tokens, specc.detach(other).generate(**prompt(2), **SETTINGS))
    assert not torch.equal(tokens, model.generate(**prompt(2), **SETTINGS))


def test_attach_leaves_a_foreign_generate_alone() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.generate = lambda *args, **kwargs: "mine"
    with pytest.raises(InputError, match="replaced by something else"):
        specc.attach(model, **SPECC)
    with pytest.raises(InputError, match="not attached"):
        specc.detach(model)
    assert model.generate() == "mine"


@pytest.mark.parametrize("door", [specc.generate, None])
def test_the_config_may_be_positional(door: Any) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False)
    ids = prompt(1)["input_ids"]
    model = copy.deepcopy(tiny("llama"))
    if door is None:
        tokens = specc.attach(model, **SPECC).generate(ids, config)
    else:
        tokens = door(model, ids, config, **SPECC)
    assert torch.equal(tokens, tiny("llama").generate(ids, config))


def test_arguments_that_say_no_are_no_requests() -> None:
    settings = {"synced_gpus": False, "num_beams": 1, "output_scores": False, "assistant_model": None}
    assert torch.equal(through_function(**settings), plain())


def test_a_stop_on_the_host_is_what_is_counted() -> None:
    token = int(plain(1)[0, WIDTH + 3])
    criteria = [AfterToken(token)]
    output = through_function(
        1, draft=tiny("llama"), stopping_criteria=criteria, return_dict_in_generate=True
    )
    assert output.speculation.new_tokens == output.sequences.shape[1] - WIDTH


def test_forced_providers_hold_in_the_step_too() -> None:
    with pytest.raises(ProviderError, match="greedy_select .*needs a CUDA or HIP device"):
        through_function(1, options={"providers": {"greedy_select": "triton"}})
    tokens = through_function(options={"providers": {"greedy_select": "reference"}})
    assert torch.equal(tokens, plain())


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


def test_max_time_stops_and_keeps_the_prefix() -> None:
    tokens = through_function(max_time=0.0)
    assert torch.equal(tokens, plain()[:, : tokens.shape[1]])
    assert tokens.shape[1] == WIDTH + 1


def test_attach_is_undone_by_detach() -> None:
    model = tiny("llama")
    specc.attach(model, **SPECC)
    with pytest.raises(InputError, match="detach"):
        specc.attach(model, **SPECC)
    output = model.generate(**prompt(2), **SETTINGS, return_dict_in_generate=True)
    assert output.speculation.mean_accepted_length > 1
    specc.detach(model)
    assert "generate" not in vars(model)
    assert not hasattr(model.generate(**prompt(2), **SETTINGS, return_dict_in_generate=True), "speculation")
    with pytest.raises(InputError, match="not attached"):
        specc.detach(model)


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


def test_recurrent_models_are_refused_by_name() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=32,
        num_hidden_layers=1,
        vocab_size=VOCAB,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    )
    model = Mamba2ForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="Mamba2ForCausalLM.* recurrent layers.*own generate"):
        specc.generate(model, IDS, **SPECC, **SETTINGS)
    with pytest.raises(UnsupportedError, match="draft model .*recurrent"):
        specc.generate(tiny("llama"), IDS, **{**SPECC, "draft": model}, **SETTINGS)


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
