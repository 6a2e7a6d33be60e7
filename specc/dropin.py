"""The drop-in: ``specc.generate``, ``specc.attach``, ``model.generate(custom_generate=specc.generate)``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from specc import checks, compat
from specc.errors import InputError, UnsupportedError
from specc.lowerings.devices import exact_by_default
from specc.options import Options
from specc.pipeline import parse_options
from specc.runtime.model import PREFILL_CHUNK
from specc.runtime.session import Request, Speculation, run


@dataclasses.dataclass
class SpeccOutput(GenerateDecoderOnlyOutput):
    """What ``return_dict_in_generate=True`` returns: Hugging Face's fields, and how it went."""

    speculation: Speculation | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments that are specc's own."""

    draft: Any
    num_draft_tokens: int
    kv_dtype: str | None
    state_dtype: str | None
    options: Options
    compile: bool
    device_graph: str
    steps_ahead: int | None


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    draft: Any = None,
    num_draft_tokens: int = 4,
    kv_dtype: str | None = None,
    state_dtype: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    compile: bool = True,
    device_graph: str = "on",
    steps_ahead: int | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | SpeccOutput:
    """Generate as ``model.generate(..., do_sample=False)`` does, the same tokens, by speculation.

    Takes what the model's ``generate`` takes, and: ``draft``, "ngram" (prompt lookup) or a causal LM
    of the same vocabulary; ``num_draft_tokens`` (D, 1 to 64), the tokens of a verify block: D - 1
    drafts and the bonus token; ``kv_dtype``, "fp8" to keep keys and values as float8_e4m3fn, which halves
    their memory and changes tokens (None: the model's own dtype); ``state_dtype``, "bf16" to keep the
    states of recurrent layers as bfloat16 (None: float32); ``options``, see specc.Options;
    ``compile=False`` runs the model's forward without capturing it; ``device_graph``, "on" to capture a whole
    step as one graph where the device has such graphs (CUDA, HIP), "try" to go on without one if that fails,
    "off"; ``steps_ahead``, steps to queue on the device before the host looks at the first (None: 2 where
    steps can be queued, else 1), which changes nothing but time. A generation config's
    ``prefill_chunk_size`` is how many tokens of a prompt are read at once, two at least.

    Returns token ids int64 [B, P + new tokens], or a SpeccOutput under ``return_dict_in_generate``.

    Raises InputError for prompts, models and drafts that do not fit, UnsupportedError for what specc
    does not do, OptionError for wrong ``options``; all before any work starts. PoolError if keys and
    values do not fit into memory, CaptureError if the model's forward cannot be captured, StepCaptureError
    if the step cannot.
    """
    model = compat.uncompiled(model)
    settings = _settings(
        model,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        options=options,
        compile=compile,
        device_graph=device_graph,
        steps_ahead=steps_ahead,
    )
    if compat.is_prepared(generation_config):
        return _called_by_hf(
            model, inputs, settings, generation_config, logits_processor, stopping_criteria, kwargs
        )
    if not isinstance(generation_config, GenerationConfig | None):
        kind = type(generation_config).__name__
        raise InputError(f"generation_config must be a GenerationConfig, got {kind}")
    prompts = inputs if inputs is not None else kwargs.get("input_ids")
    if prompts is not None:
        checks.check_prompt(prompts, kwargs.get("attention_mask"), model)
    checks.check_arguments(kwargs)
    checks.check_settings(_effective(model, generation_config, kwargs))
    caller, generation_config, criteria = _with_stop_strings(
        model, generation_config, stopping_criteria, tokenizer, kwargs
    )

    def decode(
        _: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeccOutput:
        return _decode(
            model,
            input_ids,
            settings,
            generation_config,
            logits_processor,
            stopping_criteria,
            streamer,
            model_kwargs,
        )

    # The class's generate: an attached model's own would come back here.
    return type(model).generate(
        caller,
        inputs,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=criteria,
        custom_generate=decode,
        **kwargs,
    )


def attach(
    model: Any,
    *,
    draft: Any = None,
    num_draft_tokens: int = 4,
    kv_dtype: str | None = None,
    state_dtype: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    compile: bool = True,
    device_graph: str = "on",
    steps_ahead: int | None = None,
) -> Any:
    """Make ``model.generate(...)`` speculate until ``detach(model)``; returns the model.

    The arguments are those of ``generate``; so are the errors.
    """
    original = getattr(model, "_orig_mod", model)
    if _is_attached(original):
        raise InputError("this model is attached already: call specc.detach(model) first")
    if "generate" in vars(original):
        raise InputError("this model's generate is replaced by something else: attach would hide that")
    settings = _settings(
        compat.uncompiled(model),
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        options=options,
        compile=compile,
        device_graph=device_graph,
        steps_ahead=steps_ahead,
    )
    # A bound method, so that a copy of the model speculates with the copy's weights.
    original.generate = types.MethodType(_Attached(settings, type(original).generate), original)
    return model


def detach(model: Any) -> Any:
    """Give an attached model its own generate back; returns the model."""
    original = getattr(model, "_orig_mod", model)
    if not _is_attached(original):
        raise InputError("this model is not attached: call specc.attach(model, draft=...) first")
    del original.generate
    return model


class _Attached:
    """What an attached model's ``generate`` calls."""

    def __init__(self, settings: Settings, wrapped: Any) -> None:
        functools.update_wrapper(self, wrapped)
        self._settings = settings

    def __call__(
        self,
        model: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Tensor | SpeccOutput:
        own = {field.name: getattr(self._settings, field.name) for field in dataclasses.fields(Settings)}
        return generate(model, inputs, generation_config, **{**own, **kwargs})


def _is_attached(model: Any) -> bool:
    return isinstance(getattr(vars(model).get("generate"), "__func__", None), _Attached)


def _settings(model: Any, *, draft: Any, options: Any, **given: Any) -> Settings:
    parsed = parse_options(options)
    draft = compat.uncompiled(draft)
    checks.check_model(model)
    checks.check_draft(draft, model)
    for name, value in given.items():
        checks.SETTINGS[name](value)
    return Settings(draft=draft, options=parsed, **given)


def _effective(
    model: Any, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings as generate will merge them: call, then the config given, then the model's."""
    sources = [kwargs]
    sources += [vars(each) for each in (generation_config, model.generation_config) if each is not None]
    return {
        name: next((source[name] for source in sources if source.get(name) is not None), None)
        for name in checks.REFUSED_SETTINGS
    }


def _with_stop_strings(
    model: Any,
    generation_config: GenerationConfig | None,
    stopping_criteria: Any,
    tokenizer: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, GenerationConfig | None, StoppingCriteriaList]:
    """Turn stop_strings into a criterion: generate would look for the tokenizer that it has dropped.

    Returns the object to call generate on, and its config and criteria. Neither the model nor the
    config passed in is changed.
    """
    criteria = StoppingCriteriaList(stopping_criteria or [])
    sources = [kwargs.pop("stop_strings", None)]
    sources += [each.stop_strings for each in (generation_config, model.generation_config) if each]
    strings = next((each for each in sources if each is not None), None)
    if strings is None:
        return model, generation_config, criteria
    if tokenizer is None:
        raise InputError("stop_strings need the tokenizer: pass tokenizer= as well")
    criteria.append(StopStringCriteria(tokenizer, strings))
    if generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.stop_strings = None
    # generate refills what a config leaves open from the model's own, so that needs a copy, too.
    caller = copy.copy(model)
    caller.generation_config = copy.deepcopy(model.generation_config)
    caller.generation_config.stop_strings = None
    return caller, generation_config, criteria


def _called_by_hf(
    model: Any,
    input_ids: Any,
    settings: Settings,
    generation_config: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    model_kwargs: dict[str, Any],
) -> Tensor | SpeccOutput:
    """The custom_generate form. What generate drops on the way here is refused, not lost."""
    for name in ("streamer", "assistant_model", "synced_gpus"):
        if checks.is_given(compat.caller_argument(name)):
            raise UnsupportedError(
                f"{name} does not reach a custom_generate: call specc.generate(model, ...) instead"
                + ("" if name == "streamer" else f", without {name}")
            )
    return _decode(
        model, input_ids, settings, generation_config, logits_processor, stopping_criteria, None, model_kwargs
    )


def _decode(
    model: Any,
    input_ids: Tensor,
    settings: Settings,
    config: Any,
    logits_processor: Any,
    criteria: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor | SpeccOutput:
    """Check what ``generate`` has prepared, then run. ``config`` carries its token tensors."""
    attention_mask = model_kwargs.get("attention_mask")
    checks.check_settings(vars(config))
    checks.check_prompt(input_ids, attention_mask, model)
    _check_model_kwargs(model_kwargs)
    prompt_length = input_ids.shape[1]
    max_length = criteria.max_length or config.max_length
    checks.check_lengths(model, settings.draft, prompt_length, max_length)
    pad_token = compat.pad_token(config)
    held_ids, held_until = _held_back(logits_processor, prompt_length, input_ids)
    request = Request(
        model=model,
        prompts=input_ids,
        attention_mask=attention_mask,
        draft=settings.draft,
        num_draft_tokens=settings.num_draft_tokens,
        # A criterion is asked after a token: plain decoding makes one, however short the limit.
        max_new_tokens=max(1, max_length - prompt_length),
        eos=_eos_ids(criteria, input_ids),
        held_ids=held_ids,
        held_until=held_until,
        pad_token=None if pad_token is None else int(pad_token),
        criteria=criteria,
        streamer=streamer,
        options=_settled(settings, model, len(input_ids)),
        compiled=settings.compile,
        prefill_chunk=config.prefill_chunk_size or PREFILL_CHUNK,
        kv_dtype=checks.KV_DTYPES[settings.kv_dtype],
        state_dtype=checks.STATE_DTYPES[settings.state_dtype],
        device_graph=settings.device_graph,
        steps_ahead=settings.steps_ahead,
    )
    sequences, speculation = run(request)
    if config.return_dict_in_generate:
        return SpeccOutput(sequences=cast(torch.LongTensor, sequences), speculation=speculation)
    return sequences


def _settled(settings: Settings, model: Any, rows: int) -> Options:
    options = settings.options
    if options.exact is not None:
        return options
    # Sums that are eager, chosen by timing or named by the caller have orders of their own.
    compiled = settings.compile and options.inductor is not False
    possible = compiled and not options.max_autotune and not options.providers and not _has_experts(model)
    return dataclasses.replace(options, exact=possible and exact_by_default(model.device, model.dtype, rows))


def _has_experts(model: Any) -> bool:
    """Whether it is a mixture of experts, of which nobody has measured exact sums."""
    config = vars(model.config.get_text_config())
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in config.items())


def _check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    for name, value in model_kwargs.items():
        if name not in checks.PREPARED_ARGUMENTS and value is not None:
            raise UnsupportedError(f"{name} is not passed on to the model by specc: leave it out")
    for name in ("past_key_values", "cache_params"):
        if model_kwargs.get(name) is not None and _holds_text(model_kwargs[name]):
            raise UnsupportedError(f"{name}: {checks.REFUSED_ARGUMENTS[name]}")


def _holds_text(cache: Any) -> bool:
    """Whether a cache has been fed; generate hands over one that has not."""
    return any(
        any(layer.has_previous_state.values())
        if hasattr(layer, "has_previous_state")
        else layer.get_seq_length() > 0
        for layer in cache.layers
    )


def _held_back(processors: Any, prompt_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The one thing logits processors may ask for: some ids, the EOS, not before some length.

    Returns the ids and, for each, the number of new tokens before which it may not come.
    """
    held: dict[int, int] = {}
    for each in processors or ():
        if type(each) not in _LENGTHS:
            raise UnsupportedError(
                f"logits processors other than min_length and min_new_tokens are not supported yet, and "
                f"this call has {type(each).__name__}: pass the neutral value of the setting that asks for "
                f"it (repetition_penalty=1.0, say), which may be in model.generation_config"
            )
        until = _LENGTHS[type(each)](each) - prompt_length
        for token in each.eos_token_id.reshape(-1).tolist():
            held[token] = max(until, held.get(token, 0))
    return like.new_tensor(list(held)), like.new_tensor(list(held.values()))


# Processor -> the total length before which it holds its ids back. Subclasses may do anything.
_LENGTHS: dict[type, Callable[[Any], int]] = {
    MinLengthLogitsProcessor: lambda each: each.min_length,
    MinNewTokensLengthLogitsProcessor: lambda each: each.prompt_length_to_skip + each.min_new_tokens,
}


def _eos_ids(criteria: Any, input_ids: Tensor) -> Tensor:
    ids = [each.eos_token_id.reshape(-1) for each in criteria if type(each) is EosTokenCriteria]
    return torch.cat([each.to(input_ids) for each in [*ids, input_ids.new_empty(0)]])
