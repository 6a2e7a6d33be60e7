"""A model with a pool of its own: what the step calls to verify or to draft."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from specc import compat, leaves
from specc.options import Options
from specc.runtime.cache import CacheShapes, PagedCache
from specc.runtime.compiled import CompiledForward, GraphKey, compiled_forward
from specc.runtime.forward import block_logits, layer_shapes, next_draft, prompt_logits
from specc.runtime.masks import MaskPlan
from specc.runtime.pages import Rows
from specc.runtime.recurrent import RecurrentPlan

PREFILL_CHUNK = 512
PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Role:
    """What a model does in the step, and the function that is captured for it."""

    name: str
    function: Callable[..., Tensor]


VERIFY = Role("verify", block_logits)
DRAFT = Role("draft", next_draft)
PREFILL = Role("prefill", prompt_logits)

ANY_LENGTH = 0


class BoundModel:
    """A stock model, its rows in a paged cache, and its compiled forwards for prompts and for blocks.

    ``compiled=False`` runs the model's own eager forward in the same step. ``chunk``: the most tokens of
    a prompt that are fed at once. ``kv_dtype``: of the pool; None for the model's. ``plan``: how recurrent
    layers, if there are any, keep their states. ``blank``: a block of padding, int64 [B, q_len].
    """

    def __init__(
        self,
        model: Any,
        role: Role,
        *,
        rows: Rows,
        q_len: int,
        last_position: int,
        options: Options,
        compiled: bool,
        plan: RecurrentPlan,
        chunk: int = PREFILL_CHUNK,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        config, device = model.config.get_text_config(), model.device
        # Weak, because steps are kept by their models.
        self._model = weakref.ref(model)
        leaves.install(leaves.modeling_families(model))
        self._masks = MaskPlan.of(model)
        self._chunk = max(chunk, 2)
        shapes = _shapes(model, self._masks)
        self.cache = PagedCache(
            shapes,
            self._masks.windows(config, config.num_hidden_layers),
            rows,
            device,
            page_size=PAGE_SIZE,
            chunk=max(self._chunk, q_len),
            plan=plan,
            dtype=kv_dtype,
            drafts=role is DRAFT,
        )
        self._last_position = torch.tensor(last_position, device=device)
        self._options = dataclasses.replace(options, mode=None)
        self._compiled = compiled
        count = len(rows.leaders)
        self._q_len = fed_length(q_len, options)
        self.blank = torch.zeros(count, self._q_len, dtype=torch.int64, device=device)
        self._forward: Callable[..., Tensor] = role.function
        if compiled:
            mode = "verify" if shapes.recurrent else None
            key = GraphKey(role.name, self._q_len, count)
            self._forward = compiled_forward(
                model, key, role.function, dataclasses.replace(options, mode=mode)
            )
        self._read = self._reader(rows)

    @property
    def model(self) -> Any:
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    def fits(self, rows: Rows) -> bool:
        """Whether these rows find room in the pools."""
        return self.cache.fits(rows)

    def seat(self, rows: Rows, last_position: int) -> None:
        """Begin anew with other rows, as many. Every tensor that a captured step reads stays where it is."""
        self.cache.seat(rows)
        self._last_position.fill_(last_position)
        self._read = self._reader(rows)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What a captured step reads and writes of the pools and beside them, by name."""
        yield "last_position", self._last_position
        yield from self.cache.buffers()

    def serving(self) -> object:
        """What identifies the code that a block would be fed to now, by torch's guards; None for none."""
        if not isinstance(self._forward, CompiledForward):
            return self._forward
        return self._forward.serving(*self._arguments(self.blank))

    def _reader(self, rows: Rows) -> Callable[..., Tensor]:
        if not self._compiled:
            return PREFILL.function
        key = GraphKey(PREFILL.name, ANY_LENGTH, len(rows.unique))
        return compiled_forward(self.model, key, PREFILL.function, self._options)

    def prefill(self, prompts: Tensor, prompt_lens: Tensor) -> Tensor:
        """Read left-padded prompts [B, P] into the empty pool; logits after each prompt, [B, V].

        prompt_lens: int64 [B]. Rows with the same prompt read it once. Where P is 0, so is the size of V.
        """
        cache = self.cache
        readers = torch.zeros_like(cache.rows.seq_lens).scatter_(
            0, cache.reader_of_row, torch.arange(len(prompts), device=prompts.device)
        )
        prompts, lens = prompts[readers], prompt_lens[readers]
        if any(stop - start == 1 for start, stop in _chunks(prompts.shape[1], self._chunk)):
            # Graphs treat a length of one as a constant. With one more column, no piece has it.
            prompts = torch.nn.functional.pad(prompts, (1, 0))
        padding = prompts.shape[1] - lens
        logits = prompts.new_empty(0)
        for start, stop in _chunks(prompts.shape[1], self._chunk):
            cache.rows.seq_lens.copy_(start - padding)
            logits = self._read(*self._arguments(_chunk_of(prompts, start, stop)))
        cache.share_prompts(prompt_lens)
        return logits[cache.reader_of_row] if prompts.shape[1] else logits

    def warm_up_prefill(self) -> float:
        """Compile the reading of prompts if it is not; seconds. Feeds padding, which no row keeps."""
        if not isinstance(self._read, CompiledForward):
            return 0.0
        rows = self.cache.rows
        blank = torch.zeros(rows.seq_lens.shape[0], 2, dtype=torch.int64, device=rows.seq_lens.device)
        rows.seq_lens.fill_(-2)
        return self._read.warm_up(*self._arguments(_chunk_of(blank, 0, 2)))

    def warm_up(self) -> float:
        """Compile the forward if it is not; seconds. Needs a prefilled pool, whose scratch it uses."""
        if not isinstance(self._forward, CompiledForward):
            return 0.0
        return self._forward.warm_up(*self._arguments(self.blank))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run the role's function on a block behind each row's length. tokens: int64 [B, q_len].

        What comes after each token, [B, q_len, V], or after the last one, [B]. Raises PoolError if recurrent
        layers have no room for so many.
        """
        missing = self._q_len - tokens.shape[1]
        self.cache.recurrent.check_room(max(tokens.shape[1], self._q_len))
        if missing == 0:
            return self._forward(*self._arguments(tokens))
        fed = torch.nn.functional.pad(tokens, (0, missing))
        return self._forward(*self._arguments(fed))[:, : tokens.shape[1]]

    def _arguments(self, tokens: Tensor) -> tuple[Any, ...]:
        return self.model, tokens, self.cache, self._masks, self._last_position


def fed_length(q_len: int, options: Options) -> int:
    """Tokens of the blocks that a forward is compiled for, if it is to be given ``q_len``."""
    # One row alone is summed in another way, by products and by Inductor's reductions.
    return max(q_len, 2) if options.exact else q_len


def _chunks(width: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut [0, width) into the fewest pieces of at most ``chunk``, none much shorter than another.

    Nothing is cut into no pieces.
    """
    count = -(-width // chunk)
    return ((width * i // count, width * (i + 1) // count) for i in range(count))


def _chunk_of(prompts: Tensor, start: int, stop: int) -> Tensor:
    tokens = prompts[:, start:stop].clone(memory_format=torch.contiguous_format)
    compat.mark_dynamic(tokens, 1)
    return tokens


_SHAPES: weakref.WeakKeyDictionary[Any, dict[torch.dtype, CacheShapes]] = weakref.WeakKeyDictionary()


def _shapes(model: Any, masks: MaskPlan) -> CacheShapes:
    known = _SHAPES.setdefault(model, {})
    if model.dtype not in known:
        known[model.dtype] = layer_shapes(model, masks)
    return known[model.dtype]
