"""Reports on their way to the host, with stand-ins for streams, events and pinned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specc.runtime.cuda_graph import CudaLink

DEVICE = torch.device("cpu")


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


class Event:
    """Remembers whether it was recorded since it was last waited for."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self, _: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "nothing to wait for"
        self.recorded = False


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pinned buffers, as they are made."""
    buffers: list[torch.Tensor] = []
    empty_like = torch.empty_like

    def pinned(like: torch.Tensor, device: str, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        buffers.append(empty_like(like, device=device))
        return buffers[-1]

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "empty_like", pinned)
    return buffers


def report(rows: int, number: int) -> torch.Tensor:
    return torch.full((rows, 4), number)


def received(link: CudaLink) -> list[list[int]]:
    link.wait()
    return link.receive()


def test_reports_come_in_the_order_in_which_they_were_sent(made: list[torch.Tensor]) -> None:
    link = CudaLink(DEVICE)
    link.expect(report(2, 0), 2)
    link.send(report(2, 0))
    for number in range(1, 9):
        link.send(report(2, number))
        assert received(link) == report(2, number - 1).tolist()
    assert len(made) == 2, "as many buffers as reports on their way"


def test_a_batch_of_other_rows_gets_buffers_of_its_own(made: list[torch.Tensor]) -> None:
    link = CudaLink(DEVICE)
    for rows in (2, 3, 1):
        link.expect(report(rows, 0), 2)
        link.send(report(rows, rows))
        link.send(report(rows, 7))
        assert received(link) == report(rows, rows).tolist()
        link.discard()
    assert [len(each) for each in made] == [2, 2, 3, 3, 1, 1]


def test_what_is_discarded_is_not_received_later(made: list[torch.Tensor]) -> None:
    link = CudaLink(DEVICE)
    link.expect(report(2, 0), 2)
    link.send(report(2, 1))
    link.discard()
    link.expect(report(2, 0), 1)
    link.send(report(2, 2))
    assert received(link) == report(2, 2).tolist()


def test_a_link_kept_from_inference_mode_serves_without_it(made: list[torch.Tensor]) -> None:
    link, sent = CudaLink(DEVICE), report(2, 5)
    with torch.inference_mode():
        link.expect(sent, 1)
        link.send(sent)
        assert received(link) == sent.tolist()
    with torch.no_grad():
        link.send(sent)
        assert received(link) == sent.tolist()
