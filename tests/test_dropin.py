"""The three doors and generate's contract: streamers, criteria, outputs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
)

import specc
from specc import dropin, progress
from specc.errors import InputError, ProviderError
from specc.lowerings.devices import exact_by_default
from tests.doors import (
    DOORS,
    FULL_DOORS,
    SETTINGS,
    SPECC,
    WIDTH,
    AfterToken,
    Recorder,
    characters,
    plain,
    through_function,
)
from tests.families import noisy_copy, prompt, tiny


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


class StopHereError(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "settings", "cheap", "settled"),
    [
        ("llama", {}, True, True),
        ("llama", {}, False, False),
        ("llama", {"options": {"exact": False}}, True, False),
        ("llama", {"options": {"max_autotune": True}}, True, False),
        ("llama", {"options": {"inductor": False}}, True, False),
        ("llama", {"options": {"inductor": False, "exact": True}}, False, True),
        ("llama", {"options": {"providers": {"linear": "reference"}}}, True, False),
        ("llama", {"compile": False}, True, False),
        ("llama", {"compile": False, "options": {"exact": True}}, False, True),
        ("mixtral", {}, True, False),
        ("gpt_oss", {}, True, False),
        ("deepseek_v3", {}, True, False),
    ],
)
def test_exact_is_the_default_where_it_is_cheap(
    family: str, settings: dict[str, Any], cheap: bool, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(request: Any) -> Any:
        assert request.options.exact is settled
        raise StopHereError

    monkeypatch.setattr(dropin, "run", stopped)
    monkeypatch.setattr(dropin, "exact_by_default", lambda device, dtype, rows: cheap)
    with pytest.raises(StopHereError):
        specc.generate(tiny(family), **prompt(1), draft="ngram", **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("device", "hip", "dtype", "rows", "cheap"),
    [
        ("cuda", None, torch.bfloat16, 1, True),
        ("cuda", None, torch.bfloat16, 2, False),
        ("cuda", None, torch.float16, 1, False),
        ("cuda", None, torch.float32, 1, False),
        ("cuda", "7.0", torch.bfloat16, 1, False),
        ("cpu", None, torch.bfloat16, 1, False),
    ],
)
def test_where_exact_is_cheap(
    device: str, hip: str | None, dtype: torch.dtype, rows: int, cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert exact_by_default(torch.device(device), dtype, rows) is cheap


def test_what_is_compiled_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    model, draft = copy.deepcopy(tiny("llama")), noisy_copy("llama")
    specc.generate(model, **prompt(1), draft=draft, options={"inductor": False}, **SETTINGS)
    said = capsys.readouterr().err
    for graph in ("prefill graph", "verify graph (4 tokens, 1 row)", "draft graph (2 tokens, 1 row)"):
        assert f"compiling the {graph}" in said


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
    went = output.speculation
    assert went.mean_accepted_length > 1
    assert went.batch_steps < went.steps < 2 * went.batch_steps
    specc.detach(model)
    assert "generate" not in vars(model)
    assert not hasattr(model.generate(**prompt(2), **SETTINGS, return_dict_in_generate=True), "speculation")
    with pytest.raises(InputError, match="not attached"):
        specc.detach(model)
