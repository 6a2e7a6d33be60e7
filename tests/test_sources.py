"""What an error of compiled code says of where it came up."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import Tensor, nn

from specc import sources

REFUSING = {"now": False}


@torch.library.custom_op("specc_tests::refuses", mutates_args=())
def refuses(x: Tensor) -> Tensor:
    if REFUSING["now"]:
        raise RuntimeError("not now")
    return x.clone()


@refuses.register_fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x) * 3
        return refuses(y) - 1


@pytest.mark.parametrize("inductor", [True, False])
def test_the_operator_and_the_models_line(
    inductor: bool, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    """Compiled anew, and again from torch's cache, as the next process would."""
    for _ in range(2):
        torch.compiler.reset()
        sources._LINES.clear()
        compiled = torch.compile(Model(), backend="specc", options={"inductor": inductor})
        x = torch.randn(4, 8)
        with torch.inference_mode(), monkeypatch.context() as refusing:
            compiled(x)
            refusing.setitem(REFUSING, "now", True)
            with pytest.raises(RuntimeError, match="not now") as caught:
                compiled(x)
        found = sources.origin(caught.value)
        assert found.startswith("specc_tests.refuses, called at "), found
        assert "test_sources.py:" in found
        assert "return refuses(y) - 1, in " in found
        assert found.endswith('raise RuntimeError("not now")')


def test_a_node_of_inductors_code_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comment over a call names the node; where two graphs have one of the name, both lines are said."""

    def raising(code: str) -> BaseException:
        name = "inductors_code.py"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        with pytest.raises(ZeroDivisionError) as caught:
            exec(compile(code, name, "exec"))
        return caught.value

    comment = "# Topologically Sorted Source Nodes: [mul_3, cpu], Original ATen: [aten.mul, aten._to_copy]\n"
    error = raising(comment + "buffer = [0]\nbuffer.append(1 / 0)\n")
    assert sources.origin(error) == "aten._to_copy, in inductors_code.py:3: buffer.append(1 / 0)"
    lines = {"a.py:7: x.cpu()": None, "b.py:9: y.cpu()": None}
    monkeypatch.setitem(sources._LINES, ("aten._to_copy", "cpu"), lines)
    assert "aten._to_copy, called at a.py:7: x.cpu() or b.py:9: y.cpu(), in" in sources.origin(error)
    lines |= {f"c.py:{number}: z.cpu()": None for number in range(sources.MOST_LINES)}
    assert "called at" not in sources.origin(error)


def test_elsewhere_it_is_the_innermost_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert sources.origin(caught.value).endswith("_ = 1 / 0")
