"""How captures begin and end, with a stand-in for the device's graph: what fails leaves nothing open."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specc.errors import StepCaptureError
from specc.runtime import cuda_graph

POOL = (0, 7)


class StandIn:
    """Takes down what is done with it, and fails where it is told to."""

    calls: list[str]
    fails_at: str | None

    def __init__(self, keep_graph: bool) -> None:
        assert keep_graph

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise RuntimeError(f"{name} failed")

    def capture_begin(self, **_: Any) -> None:
        self._do("begin")

    def capture_end(self) -> None:
        self._do("end")

    def instantiate(self) -> None:
        self._do("instantiate")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(StandIn, "calls", seen, raising=False)
    monkeypatch.setattr(StandIn, "fails_at", None, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_graph.compat, "end_allocations", lambda *_: seen.append("end allocations"))
    place = object.__new__(cuda_graph._Place)
    place.pool = POOL
    monkeypatch.setattr(cuda_graph, "_PLACES", {(0, 0): place})
    return seen


def test_a_capture_that_works(calls: list[str]) -> None:
    cuda_graph._captured(lambda: calls.append("program"), POOL)
    assert calls == ["begin", "program", "end", "instantiate"]
    assert cuda_graph._PLACES


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("boom"), StepCaptureError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_program_that_fails(error: BaseException, raised: type[BaseException], calls: list[str]) -> None:
    def program() -> None:
        raise error

    with pytest.raises(raised):
        cuda_graph._captured(program, POOL)
    assert calls == ["begin", "end", "end allocations"]
    assert not cuda_graph._PLACES, "nothing is captured into that pool again"


@pytest.mark.parametrize("fails_at", ["end", "instantiate"])
def test_an_end_that_fails(fails_at: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "fails_at", fails_at)
    with pytest.raises(StepCaptureError, match=f'{fails_at} failed. device_graph="try"'):
        cuda_graph._captured(lambda: None, POOL)
    assert calls[-1] == "end allocations"
    assert not cuda_graph._PLACES
