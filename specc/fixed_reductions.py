"""Reductions whose sums do not depend on how many rows there are, from Inductor.

Inductor chooses a GPU kernel's tile for a reduction by the number of its rows, and for long rows by timing
candidates. Another tile adds the numbers of a row in another order: a norm over 4096 in a block of 2 tokens
and in one of 3 differed in a fifth of its float32 results (H200, torch 2.11). Here the tile is a function of
the length of a row alone. Inductor has a hook for that (InductorChoices.triton_kernel_kwargs).

That holds from two rows on: of a single one, Triton may lay out a tile in another way.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

# Entries of a tile that a warp takes.
PER_WARP = 256
MOST_WARPS = 16
# Sums up to this length are taken at once, longer ones in a loop over so many entries.
AT_ONCE, IN_A_LOOP = 1024, 4096
# Sums up to this length are often over a dimension that is not the last (of experts, say): a tile of many
# then reads neighbours.
SHORT, MANY = 64, 64


# What else would choose by the number of rows or by timing, or asks for kernels that this does not know.
CONFIG = {
    "max_autotune": False,
    "max_autotune_gemm": False,
    "triton.coalesce_tiling_analysis": False,
    "triton.mix_order_reduction": False,
    "triton.nested_reduction": False,
    "triton.prefer_nd_tiling": False,
    "triton.tile_reductions": False,
    "triton.use_block_ptr": False,
    "triton.use_tensor_descriptor": False,
}


@contextlib.contextmanager
def fixed_reductions() -> Iterator[None]:
    """Within this, and with CONFIG, Inductor compiles sums of a known length so, however many there are.

    No reduction is split among programs, which can cost where few sums are long.
    """
    from torch._inductor.virtualized import V

    # A user may have replaced the choices by a class with a state of its own.
    choices = copy.copy(V.choices)
    choices.__class__ = _fixed(type(choices))
    with V.set_choices_handler(choices):
        yield


def _fixed(base: Any) -> Any:
    """A class of choices that leaves the rest to ``base``."""

    class Fixed(base):
        def triton_kernel_kwargs(
            self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            from torch._inductor.codegen.triton import FixedTritonConfig

            settings = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
            if not _is_fixed(features, groups[0]):
                return settings
            tile, at_once = tile_of(int(features.reduction_numel))
            if settings.get("override_persistent_reduction", at_once) != at_once:
                return settings
            return {
                **settings,
                "fixed_config": FixedTritonConfig(tile),
                "override_persistent_reduction": at_once,
                "override_cooperative_reduction": False,
            }

        @staticmethod
        def reduction_split_factor(*_: Any, **__: Any) -> int:
            """One program sums all of a row: a split would depend on the number of rows."""
            return 1

    return Fixed


def _is_fixed(features: Any, tiling: dict[str, Any]) -> bool:
    """Whether a kernel is a reduction along one dimension, of a known length. Scans and sorts are not."""
    if not features.is_reduction() or any(features.contains_op(name) for name in ("scan", "sort")):
        return False
    length = features.reduction_numel
    return set(tiling) == {"x", "r0_"} and (isinstance(length, int) or bool(length.is_Integer))


def tile_of(length: int) -> tuple[dict[str, int], bool]:
    """A tile's sizes, warps and stages for sums of ``length``, and whether it takes a sum at once."""
    whole = 1 << (length - 1).bit_length()
    at_once = whole <= AT_ONCE
    entries = whole if at_once else min(whole, IN_A_LOOP)
    sums = MANY if whole <= SHORT else max(PER_WARP // entries, 1)
    warps = min(max(sums * entries // PER_WARP, 1), MOST_WARPS)
    tile = {"XBLOCK": sums, "num_warps": warps, "num_stages": 1}
    # A kernel that takes a sum at once has that size in its text.
    return (tile if at_once else {**tile, "R0_BLOCK": entries}), at_once
