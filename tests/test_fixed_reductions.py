"""With ``exact``, Inductor's tile for a reduction is a function of its length: seen in the source it writes.

Without a GPU: Inductor's Triton code for a CPU, which is written as for a GPU, and not compiled any further.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from specc import compat
from specc.fixed_reductions import CONFIG, fixed_reductions, tile_of
from specc.lowerings.triton_kernels import obstacle

ROWS = (2, 12, 96, 700)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def block(x: torch.Tensor, heads: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A norm over 4096, one over heads, a router's softmax, sums over experts, over far more, and of two that
    lie in memory in different ways.
    """
    sums = heads.sum(1), x.repeat(1, 16).square().sum(-1), (heads[:, :16] + turned.permute(2, 0, 1)).sum(1)
    return norm(x), norm(heads), x[:, :64].softmax(-1), *sums


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    from torch._inductor import config

    with fixed_reductions(), config.patch(compat.known_inductor_settings(CONFIG)):
        yield


class Driver:
    """Enough of a GPU's driver to be asked for the target."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Callable[..., set[str]]:
    import triton
    from torch._inductor import async_compile, config

    sources: list[str] = []

    def keep(self: Any, kernel_name: str, source_code: str, *_: Any, **__: Any) -> None:
        sources.append(source_code)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(async_compile.AsyncCompile, "triton", keep)

    def of(rows: int, how: Callable[[], Any], dynamic: bool = False) -> set[str]:
        """What each kernel of ``block`` says of its tiles."""
        sources.clear()
        torch._dynamo.reset()
        inputs = torch.randn(rows, 4096), torch.randn(rows, 32, 256), torch.randn(16, 256, rows)
        # There is no kernel to run.
        stopped = pytest.raises(AttributeError, match="'run'")
        patched = config.patch(cpu_backend="triton", force_disable_caches=True)
        with torch.no_grad(), patched, how(), stopped:
            if dynamic:
                for each, size in zip(inputs, (0, 0, 2), strict=True):
                    torch._dynamo.mark_dynamic(each, size)
            torch.compile(block, dynamic=None if dynamic else False)(*inputs)
        found = (re.search(r"@triton_heuristics\.(\w+\(.*?)filename", text, re.DOTALL) for text in sources)
        return {" ".join(each[1].split()) for each in found if each}

    return of


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_tiles_do_not_depend_on_the_number_of_rows(configurations: Callable[..., set[str]]) -> None:
    tiles = {rows: configurations(rows, exactly) for rows in ROWS}
    assert len(tiles[2]) >= 4
    assert all(each.startswith("fixed_config(") for each in tiles[2])
    assert all(tiles[rows] == tiles[2] for rows in ROWS)
    # Prompts of any length: their graph may be compiled anew for another block, and timed anew.
    assert configurations(12, exactly, dynamic=True) == tiles[2]


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_inductors_own_do(configurations: Callable[..., set[str]]) -> None:
    """What the option is there for; nothing of it is left behind."""
    with exactly():
        pass
    tiles = [configurations(rows, contextlib.nullcontext) for rows in ROWS]
    assert not any("fixed_config" in each for found in tiles for each in found)
    assert all(tiles[0] != other for other in tiles[1:])


def test_choices_of_a_users_own_are_kept() -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Own(InductorChoices):
        def __init__(self, mine: str) -> None:
            self.mine = mine

    with V.set_choices_handler(Own("kept")):
        with fixed_reductions():
            choices: Any = V.choices
            assert isinstance(choices, Own)
            assert (choices.mine, choices.reduction_split_factor(None, 2**20, 1, True)) == ("kept", 1)
        assert type(V.choices) is Own


@pytest.mark.parametrize("length", [1, 3, 64, 65, 128, 1000, 1024, 1025, 4096, 5120, 131072])
def test_tiles(length: int) -> None:
    tile, at_once = tile_of(length)
    entries = tile.get("R0_BLOCK", 1 << (length - 1).bit_length())
    assert at_once == (length <= 1024) == ("R0_BLOCK" not in tile)
    assert 1 <= tile["num_warps"] <= 16
    assert tile["XBLOCK"] * entries <= 4096
