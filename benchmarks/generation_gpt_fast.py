"""gpt-fast as a peer: its own code, from a checkout that whoever runs this names, on the pair's weights.

Commit bc04265 or older: later ones fail when they speculate. No tokenizer and no checkpoint are needed. With
torch 2.11 what its compiled decoding returns is copied, two small copies a token, or it would fail.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import Pair
from specc.bench import Call, Outcome, Steps, Way

# Its script sets these for the whole process; here they hold while its own code compiles.
INDUCTOR = {"coordinate_descent_tuning": True, "triton.unique_kernel_names": True}

Functions = Mapping[str, Callable[..., Any]]


class GptFast:
    """Both models of a pair in gpt-fast's classes. ``length``: the most tokens a call may come to."""

    def __init__(self, checkout: Path, pair: Pair, length: int, max_drafts: int) -> None:
        self._code = _modules(checkout)
        self._pair = pair
        self._functions: Functions = {
            name: getattr(self._code, name) for name in ("decode_one_token", "model_forward")
        }
        self._target, self._draft = (self._transformer(model, length) for model in (pair.target, pair.draft))
        # Caches that never grow are compiled against once.
        with torch.device(pair.device):
            for each in (self._target, self._draft):
                each.setup_caches(max_batch_size=1, max_seq_length=length + max_drafts + 1)

    def load(self) -> None:
        """Take over the pair's weights as they are now, in place."""
        copy_weights(self._pair.target, self._target)
        copy_weights(self._pair.draft, self._draft)

    def plain(self, inputs: Mapping[str, Any]) -> Way:
        """Its decoding without speculation."""

        def prepare() -> Call:
            functions = self._compiled()
            return lambda new_tokens: Outcome(self._generate(functions, inputs, new_tokens)[0])

        return Way("gpt-fast", prepare, shortest=2, warm_ups=2)

    def speculative(self, inputs: Mapping[str, Any], num_drafts: int) -> Way:
        def prepare() -> Call:
            functions = self._compiled()

            def call(new_tokens: int) -> Outcome:
                tokens, counts = self._generate(functions, inputs, new_tokens, self._draft, num_drafts)
                emitted = [accepted + 1 for accepted, steps in enumerate(counts) for _ in range(steps)]
                return Outcome(tokens, Steps.of(emitted, num_drafts))

            return call

        return Way(f"gpt-fast, draft of {num_drafts}", prepare, warm_ups=2)

    def _generate(
        self,
        functions: Functions,
        inputs: Mapping[str, Any],
        new_tokens: int,
        draft_model: Any = None,
        speculate_k: int = 0,
    ) -> tuple[Tensor, list[int]]:
        prompt = inputs["input_ids"][0]
        vars(self._code).update(functions)
        with torch._inductor.config.patch(INDUCTOR):
            sequence, stats = self._code.generate(
                self._target,
                prompt,
                new_tokens,
                interactive=False,
                draft_model=draft_model,
                speculate_k=speculate_k,
                temperature=0.0,
            )
        return sequence[len(prompt) :].cpu()[None], stats["accept_counts"]

    def _compiled(self) -> Functions:
        """As its script does. Anew for each way: a second block length would compile with dynamic shapes."""
        if self._pair.device.type == "cpu":
            return self._functions
        compiled = {
            name: torch.compile(_copy(function), mode="reduce-overhead", fullgraph=True)
            for name, function in self._functions.items()
        }
        # It feeds a call what the call before returned, which torch 2.11's graph has overwritten by then.
        return {**compiled, "decode_one_token": _cloned(compiled["decode_one_token"])}

    def _transformer(self, model: Any, length: int) -> Any:
        config = model.config
        arguments = self._code.ModelArgs(
            block_size=length + 64,
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            dim=config.hidden_size,
            intermediate_size=config.intermediate_size,
            n_local_heads=config.num_key_value_heads,
            rope_base=config.rope_parameters["rope_theta"],
            norm_eps=config.rms_norm_eps,
        )
        with torch.device(model.device):
            transformer = self._code.Transformer(arguments)
        return transformer.to(model.dtype).eval()


def _cloned(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def call(*arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
        return tuple(each.clone() for each in function(*arguments, **settings))

    return call


def _copy(function: Any) -> Any:
    """The same function with a code object of its own, which is what compiled code is kept by."""
    copied = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copied


def copy_weights(source: Any, target: Any) -> None:
    """Copy a Llama of transformers into gpt-fast's Transformer. Its rotary embedding turns neighbours."""
    config = source.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with torch.no_grad():
        target.tok_embeddings.weight.copy_(source.model.embed_tokens.weight)
        target.output.weight.copy_(source.lm_head.weight)
        target.norm.weight.copy_(source.model.norm.weight)
        for layer, into in zip(source.model.layers, target.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            rotated = [interleaved(getattr(attention, name).weight, count) for name, count in heads.items()]
            into.attention.wqkv.weight.copy_(torch.cat([*rotated, attention.v_proj.weight]))
            into.attention.wo.weight.copy_(attention.o_proj.weight)
            for name, projection in (("w1", mlp.gate_proj), ("w3", mlp.up_proj), ("w2", mlp.down_proj)):
                getattr(into.feed_forward, name).weight.copy_(projection.weight)
            into.attention_norm.weight.copy_(layer.input_layernorm.weight)
            into.ffn_norm.weight.copy_(layer.post_attention_layernorm.weight)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection [heads * D, C] reordered so that the pairs (i, i + D / 2) become neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _modules(checkout: Path) -> Any:
    """Its ``generate`` module. Its modules stay known by their bare names: compiling imports them again."""
    from torch._inductor import config

    # Its tokenizer module wants packages for what is not used here.
    tokenizer: Any = types.ModuleType("tokenizer")
    tokenizer.get_tokenizer = None
    sys.modules.setdefault("tokenizer", tokenizer)
    sys.path.insert(0, str(checkout))
    # Importing it sets Inductor's config for the whole process, which is not to reach the other peers.
    saved = config.save_config()
    try:
        code: Any = importlib.import_module("generate")
        code.ModelArgs = importlib.import_module("model").ModelArgs
    finally:
        config.load_config(saved)
        sys.path.remove(str(checkout))
    return code
