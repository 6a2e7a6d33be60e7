"""Capturing a step as one device graph and replaying it: one adapter per device kind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from specc.lowerings.devices import device_kind

log = logging.getLogger(__name__)

Program = Callable[[], None]


class DeviceGraph(Protocol):
    """A program without arguments or results that works on tensors which stay where they are."""

    def capture(self, program: Program) -> None:
        """Take ``program`` for later replays. It may be run, so its effects must be repeatable."""

    def replay(self) -> None:
        """Run the captured program once."""

    def reset(self) -> None:
        """Let go of the program and what it holds."""


class EagerGraph:
    """Runs the program itself on every replay: the form for devices without graphs."""

    def __init__(self) -> None:
        self._program: Program | None = None

    def capture(self, program: Program) -> None:
        self._program = program

    def replay(self) -> None:
        if self._program is None:
            raise RuntimeError("replay before capture: call capture(program) first")
        self._program()

    def reset(self) -> None:
        self._program = None


ADAPTERS: dict[str, Callable[[], DeviceGraph]] = {"cpu": EagerGraph}


def device_graph(device: torch.device) -> DeviceGraph:
    """The adapter for a device; steps run eagerly where there is none."""
    kind = device_kind(device)
    if kind not in ADAPTERS:
        log.info("no device graphs on %s yet: the step runs eagerly there", kind)
    return ADAPTERS.get(kind, EagerGraph)()
