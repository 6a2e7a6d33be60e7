"""Steps as CUDA graphs, and as HIP graphs: torch calls both ``torch.cuda.CUDAGraph``."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from specc import compat, sources
from specc.errors import StepCaptureError

log = logging.getLogger(__name__)

# Captures change what the allocator and the libraries do for a whole device.
_capturing = threading.Lock()


class CudaGraph:
    """A program captured on a stream of its own, whose memory lies in a pool that all captures share.

    Sharing is safe because nothing that a program allocates outlives its replay, and because replays
    follow each other on the stream that was current at capture.
    """

    takes_lengths: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self.num_nodes: int | None = None

    def capture(self, program: Callable[[], None]) -> None:
        with _capturing, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            place = _place(current)
            place.stream.wait_stream(current)
            with torch.cuda.stream(place.stream):
                # Kernels are loaded and the libraries' workspaces made before, not while capturing.
                program()
                place.stream.synchronize()
                graph = _captured(program, place.pool)
            current.wait_stream(place.stream)
        self._graph, self.num_nodes = graph, _count_nodes(graph)
        log.info("captured a step of %s nodes", self.num_nodes)

    def patch(self, seq_lens: Tensor) -> None:
        """Kernels read lengths from the device's memory."""

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("replay before capture: call capture(program) first")
        self._graph.replay()


def _captured(program: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # Other threads may go on using the device meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    with contextlib.ExitStack() as undo:
        undo.callback(_abandon, graph, pool)
        try:
            program()
        except RuntimeError as error:
            raise _refusal(error, f"{sources.origin(error)}: ") from error
        undo.pop_all()
    try:
        graph.capture_end()
        graph.instantiate()
    except RuntimeError as error:
        _forget(pool)
        raise _refusal(error, "") from error
    return graph


def _refusal(error: Exception, where: str) -> StepCaptureError:
    return StepCaptureError(
        f"the step cannot be captured as one device graph: {where}{compat.first_line(error)}. "
        f'device_graph="try" runs it without one where that happens, device_graph="off" always.'
    )


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that an error may have invalidated; its pool takes no more captures."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    _forget(pool)


def _forget(pool: Any) -> None:
    """Stop the allocator from serving a capture that failed, and never capture into its pool again."""
    compat.end_allocations(torch.cuda.current_device(), pool)
    for key in [key for key, place in _PLACES.items() if place.pool == pool]:
        del _PLACES[key]


def _touch() -> None:
    torch.zeros(1, device="cuda")


class _Place:
    """A stream to capture on and a memory pool for what is captured."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        # A pool dies with the last graph in it, and its handle is of no use from then on.
        with torch.cuda.stream(self.stream):
            self._anchor = _captured(_touch, self.pool)


_PLACES: dict[tuple[int, int], _Place] = {}


def _place(current: torch.cuda.Stream) -> _Place:
    """Where to capture what will be replayed on ``current``."""
    key = current.device_index, current.stream_id
    if key not in _PLACES:
        _PLACES[key] = _Place()
    return _PLACES[key]


def release_pools() -> None:
    """Give back the memory that captures share; graphs still held keep theirs."""
    _PLACES.clear()


def current_queue(device: torch.device) -> int:
    return torch.cuda.current_stream(device).stream_id


_NODE_COUNTERS = {
    "cuda": ("libcuda.so.1", "cuGraphGetNodes"),
    "hip": ("libamdhip64.so", "hipGraphGetNodes"),
}


def _count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    library, name = _NODE_COUNTERS["cuda" if torch.version.hip is None else "hip"]
    try:
        count_nodes = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        log.info("%s has no %s: the step's nodes are not counted", library, name)
        return None
    count = ctypes.c_size_t()
    status = count_nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if status == 0 else None


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A report in pinned memory, and the event behind its copy."""

    rows: Tensor
    arrived: torch.cuda.Event

    @classmethod
    def like(cls, report: Tensor) -> _Sent:
        # It may be kept for a call outside of inference mode.
        with torch.inference_mode(False):
            return cls(torch.empty_like(report, device="cpu", pin_memory=True), torch.cuda.Event())


class CudaLink:
    """Reports go to pinned memory on the stream of the steps, each with an event behind it."""

    # One runs while the host looks at the one before.
    steps_ahead = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: collections.deque[_Sent] = collections.deque()
        self._free: list[_Sent] = []
        self._side = torch.cuda.Stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))

    def expect(self, report: Tensor, count: int) -> None:
        # A batch before this one may have had other rows.
        self._free = [each for each in self._free if each.rows.shape == report.shape]
        self._free += [_Sent.like(report) for _ in range(count - len(self._free))]

    def send(self, report: Tensor) -> None:
        sent = self._free.pop() if self._free else _Sent.like(report)
        sent.rows.copy_(report, non_blocking=True)
        sent.arrived.record(torch.cuda.current_stream(self._device))
        self._sent.append(sent)

    def wait(self) -> None:
        self._sent[0].arrived.synchronize()

    def receive(self) -> list[list[int]]:
        received = self._sent.popleft()
        self._free.append(received)
        return received.rows.tolist()

    def discard(self) -> None:
        self._sent.clear()

    def upload(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values.pin_memory(), non_blocking=True)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with torch.cuda.stream(self._side):
            yield
