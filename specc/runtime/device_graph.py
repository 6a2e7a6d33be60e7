"""Capturing a step as one device graph and replaying it: one adapter per device kind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specc.lowerings.devices import device_kind
from specc.runtime.cuda_graph import CudaGraph, CudaLink, current_queue

log = logging.getLogger(__name__)

Program = Callable[[], None]


class DeviceGraph(Protocol):
    """A program without arguments or results that works on tensors which stay where they are."""

    num_nodes: int | None
    """Nodes of the captured graph; None where there is no graph, or nobody counts them."""
    takes_lengths: ClassVar[bool]
    """Whether the host has to say before each replay how long the rows are, as NPU attention wants it.

    Such a device gets one step at a time, for the host knows lengths only once a step has reported.
    """

    def capture(self, program: Program) -> None:
        """Take ``program`` for later replays. It may be run, so its effects must be repeatable.

        Raises StepCaptureError, with nothing kept, if the device cannot capture it.
        """

    def patch(self, seq_lens: Tensor) -> None:
        """Put lengths into the captured program: int64 [rows] on the host. Where ``takes_lengths`` only."""

    def replay(self) -> None:
        """Queue the captured program once, behind what the current stream holds."""


class HostLink(Protocol):
    """What passes between the host and a device while steps are queued on it, without stopping it."""

    steps_ahead: int
    """Steps to queue before the host looks at the first."""

    def expect(self, report: Tensor, count: int) -> None:
        """Make room for so many like ``report`` on their way, which may stop the device."""

    def send(self, report: Tensor) -> None:
        """Queue a copy of ``report`` to the host, behind what the current stream holds."""

    def wait(self) -> None:
        """Until the oldest report not received yet is on the host."""

    def receive(self) -> list[list[int]]:
        """That report, row by row. Waited for it must have been."""

    def discard(self) -> None:
        """Forget what was sent and not received."""

    def upload(self, values: Tensor, target: Tensor) -> None:
        """Queue ``target.copy_(values)``; values are on the host and may change afterwards."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Work on the device that does not wait for the steps queued there."""


class EagerGraph:
    """Runs the program itself on every replay: the form for devices without graphs."""

    takes_lengths: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self.num_nodes: int | None = None
        self._program: Program | None = None

    def capture(self, program: Program) -> None:
        self._program = program

    def patch(self, seq_lens: Tensor) -> None:
        """Lengths are read where they are."""

    def replay(self) -> None:
        if self._program is None:
            raise RuntimeError("replay before capture: call capture(program) first")
        self._program()


class DirectLink:
    """For devices on which a step is over when its call returns."""

    steps_ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._reports: list[list[list[int]]] = []

    def expect(self, report: Tensor, count: int) -> None:
        """Nothing is on its way for long."""

    def send(self, report: Tensor) -> None:
        self._reports.append(report.tolist())

    def wait(self) -> None:
        """Reports are there when ``send`` returns."""

    def receive(self) -> list[list[int]]:
        return self._reports.pop(0)

    def discard(self) -> None:
        self._reports.clear()

    def upload(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        yield


GRAPHS: dict[str, Callable[[torch.device], DeviceGraph]] = {
    "cpu": EagerGraph,
    "cuda": CudaGraph,
    "hip": CudaGraph,
}
# Kinds whose graphs replay what was captured, whatever changes in Python.
FREEZING = {"cuda", "hip"}
LINKS: dict[str, Callable[[torch.device], HostLink]] = {"cuda": CudaLink, "hip": CudaLink}


QUEUES: dict[str, Callable[[torch.device], int]] = {"cuda": current_queue, "hip": current_queue}


def queue_of(device: torch.device) -> int:
    """What tells the queue that replays would go to from the device's other queues."""
    return QUEUES.get(device_kind(device), lambda _: 0)(device)


def device_graph(device: torch.device) -> DeviceGraph:
    """The adapter for a device; steps run eagerly where there is none."""
    kind = device_kind(device)
    if kind not in GRAPHS:
        log.info("no device graphs on %s yet: the step runs eagerly there", kind)
    return GRAPHS.get(kind, EagerGraph)(device)


def freezes(device: torch.device) -> bool:
    """Whether the device's graphs replay what was captured, and so are worth keeping."""
    return device_kind(device) in FREEZING


def host_link(device: torch.device) -> HostLink:
    """The link for a device; a direct one where nothing is queued."""
    return LINKS.get(device_kind(device), DirectLink)(device)
