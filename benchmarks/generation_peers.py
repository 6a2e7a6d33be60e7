"""What people decode with today, as ways to time: Hugging Face's own modes, flashspec and vLLM.

gpt-fast is in generation_gpt_fast. All run in this process, on the same weights and the same prompt.
Hugging Face's assistant and flashspec's drafter are the pair's draft, at the same number of drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, StaticCache

from benchmarks.pairs import Pair
from specc.bench import Call, Outcome, Steps, Way, hf_plain

Inputs = Mapping[str, Any]


def hf_static(pair: Pair, inputs: Inputs, kept_cache_length: int | None = None) -> Way:
    """``generate`` over a static cache with its compiled forward (reduce-overhead).

    It makes a cache per call, whose first decoding step records a CUDA graph again. With
    ``kept_cache_length``, one cache of that length serves all calls: its best case.
    """
    settings: dict[str, Any] = {"compile_config": _compile_config(pair.device)}
    if kept_cache_length is None:
        plain = hf_plain(pair.target, inputs, "generate, static", cache_implementation="static", **settings)
        return Way(plain.name, plain.prepare, warm_ups=2)
    cache = StaticCache(config=pair.target.config, max_cache_len=kept_cache_length)
    kept = hf_plain(pair.target, inputs, "generate, static, kept", past_key_values=cache, **settings)

    def prepare() -> Call:
        call = kept.prepare()

        def clean(new_tokens: int) -> Outcome:
            cache.reset()
            return call(new_tokens)

        return clean

    return Way(kept.name, prepare, warm_ups=2)


def _compile_config(device: torch.device) -> CompileConfig:
    config: Any = CompileConfig()
    # Elsewhere transformers skips the compile with a warning: this is for rehearsals.
    config._compile_all_devices = device.type == "cpu"
    return config


def flashspec(pair: Pair, inputs: Inputs, num_drafts: int, length: int) -> Way:
    """flashspec with the draft model alone, at ``num_drafts``: its default would mix in prompt lookup.

    ``length``: the most tokens a call may come to, for its static caches.
    """

    def prepare() -> Call:
        import flashspec as package
        from flashspec.engine import HuggingFaceDrafter, TargetModel

        logging.getLogger("flashspec").setLevel(logging.ERROR)
        device, dtype = pair.device, pair.target.dtype
        config = package.FlashSpecConfig(
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            drafter_strategy="bandit",
            bandit=package.BanditConfig(n_arms=1),
            sampling=package.SamplingConfig(temperature=0.0, gamma=num_drafts),
            compile=device.type == "cuda",
            # What does not fit would have it capture again.
            compile_max_cache_len=length + 2 * (num_drafts + 1),
        )
        drafter = HuggingFaceDrafter("draft", device, dtype, temperature=0.0, model=pair.draft)
        target = TargetModel("target", device, dtype, model=pair.target)
        engine = package.SpeculativeEngine(config, [drafter], target)

        def call(new_tokens: int) -> Outcome:
            result = engine.generate(inputs["input_ids"], max_new_tokens=new_tokens)
            emitted = [step.emitted for step in result.arm_steps]
            return Outcome(result.output_ids.cpu(), Steps.of(emitted, num_drafts))

        return call

    return Way(f"flashspec, draft of {num_drafts}", prepare, warm_ups=2)


def vllm(pair: Pair, inputs: Inputs, num_drafts: int, folder: Path, memory_share: float) -> Way:
    """vLLM on both models saved to ``folder``: the same weights, so real acceptance. Not yet tried."""

    def prepare() -> Call:
        import vllm as package

        models = {"target": pair.target, "draft": pair.draft}
        for name, model in models.items():
            model.save_pretrained(folder / name)
        engine = package.LLM(
            model=str(folder / "target"),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=memory_share,
            speculative_config={
                "method": "draft_model",
                "model": str(folder / "draft"),
                "num_speculative_tokens": num_drafts,
            },
        )
        prompts = [{"prompt_token_ids": row} for row in inputs["input_ids"].tolist()]

        def call(new_tokens: int) -> Outcome:
            sampling = package.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
            answers = engine.generate(prompts, sampling, use_tqdm=False)
            return Outcome(torch.tensor([answer.outputs[0].token_ids for answer in answers]))

        return call

    return Way(f"vllm, draft of {num_drafts}", prepare, warm_ups=2)
