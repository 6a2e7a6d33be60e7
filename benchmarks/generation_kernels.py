"""Where the time of a step goes: profiles of a call and of a longer one, whose difference is steps.

Products of few rows are one kernel whatever the weights: which launch reads which is taken down while the
step is captured, and the launches of a replay come in that order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.generation_floor import Floor
from specc.bench import Call

# What a kernel's name says it is; the first that fits. On a CPU, names are those of operators. Inductor's
# come first, because it names kernels after operators, too, and then specc's own.
GROUPS = (
    ("copies", r"(?i)memcpy|memset|aten::(copy_|fill_|zero_)"),
    ("products", r"tem_fused.*mm"),
    ("fused by Inductor", r"^triton_|^cpp_fused|inductor"),
    ("products", r"^_products$"),
    ("recurrent", r"^_(replay|inputs|commit|prepare|verify|recurrent|fold|snapshot)$"),
    ("attention", r"^(attend|combine|_write|_from_requests|_from_ragged)$"),
    ("choice", r"^_(block_maxima|merge_blocks)$"),
    ("recurrent", r"(?i)gated_delta|delta_rule|ssd|conv1d|conv_inputs|fold_|_replay"),
    ("attention", r"(?i)attention|flash|fmha|kv_write|scatter_.*page_table"),
    ("choice", r"(?i)greedy_select|argmax"),
    ("products", r"(?i)gemm|gemv|nvjet|cutlass|splitk|cublas|linear|aten::(mm|addmm|bmm)"),
    ("other", ""),
)
# The group that moves what a floor counts; logits are written by products.
MOVED = {
    "products": ("weights", "draft_weights", "logits"),
    "attention": ("keys_and_values",),
    "recurrent": ("states",),
}
# Calls of the runtime that stop the host until the device is idle, and those that wait for one event.
STOPS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMalloc", "cudaFree")
WAITS = ("cudaEventSynchronize",)
GRAPH_LAUNCH = "cudaGraphLaunch"
# New tokens of the two calls that are compared to count the runtime's calls.
CALLS_OF = (16, 48)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", GRAPH_LAUNCH)


PRODUCTS = "_products"


@dataclasses.dataclass(frozen=True)
class Product:
    """A launch: rows of each weight, and the elements of a row."""

    rows: tuple[int, ...]
    inner: int
    bytes: int

    @property
    def name(self) -> str:
        return f"{PRODUCTS} [{' + '.join(map(str, self.rows))}, {self.inner}]"


@contextlib.contextmanager
def captured_products() -> Iterator[list[Product]]:
    """Collects the launches of a step that is captured meanwhile."""
    from specc.lowerings.triton_kernels import linear

    launches: list[Product] = []
    multiply = linear.multiply

    def noted(outs: Any, x: Any, weights: Any, *rest: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            size = sum(each.numel() * each.element_size() for each in weights)
            launches.append(Product(tuple(map(len, weights)), x.shape[1], size))
        multiply(outs, x, weights, *rest)

    with mock.patch.object(linear, "multiply", noted):
        yield launches


def by_weights(
    launches: Sequence[Product], microseconds: Sequence[float], bandwidth: float
) -> list[dict[str, Any]]:
    """What the products of a step take, weight by weight.

    microseconds: of the launches of whole steps, in order. Nothing if they are not whole steps.
    """
    if not launches or not microseconds or len(microseconds) % len(launches):
        return []
    steps = len(microseconds) // len(launches)
    rows = {}
    for number, each in enumerate(launches):
        row = rows.setdefault(each.name, {"name": each.name, "count": 0, "microseconds": 0.0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += each.bytes
        row["microseconds"] += sum(microseconds[number :: len(launches)]) / steps
    for row in rows.values():
        row["share_of_bandwidth"] = row["bytes"] / (row["microseconds"] * 1e-6) / bandwidth
    return sorted(rows.values(), key=lambda each: -each["microseconds"])


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one call: kernel -> (times run, microseconds), the runtime's calls -> times made, and steps.

    ``products``: microseconds of each launch of PRODUCTS, in order; those of the steps come last.
    """

    kernels: dict[str, tuple[int, float]]
    runtime: dict[str, int]
    counted: int
    products: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        """All that were run: of the steps queued ahead, the last may have had nothing left to do."""
        return self.runtime.get(GRAPH_LAUNCH, self.counted)

    @classmethod
    def of(cls, call: Call, new_tokens: int, device: str) -> Profile:
        cuda = device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            outcome = call(new_tokens)
        kernels: dict[str, tuple[int, float]] = {}
        runtime: dict[str, int] = {}
        for event in profiler.key_averages():
            if event.key in (*STOPS, *WAITS, *LAUNCHES):
                runtime[event.key] = event.count
            elif event.is_user_annotation:
                continue
            elif cuda and event.device_type == DeviceType.CUDA:
                kernels[event.key] = event.count, event.self_device_time_total
            elif not cuda:
                kernels[event.key] = event.count, event.self_cpu_time_total
        if outcome.steps is None:
            raise ValueError("a profile needs a way that tells its steps")
        products = [
            (event.time_range.start, event.time_range.elapsed_us())
            for event in profiler.events()
            if event.name == PRODUCTS and event.device_type == DeviceType.CUDA
        ]
        return cls(kernels, runtime, outcome.steps.count, tuple(each for _, each in sorted(products)))


def per_step(
    call: Call,
    new_tokens: int,
    device: str,
    floor: Floor,
    bandwidth: float,
    launches: Sequence[Product] = (),
) -> dict[str, Any]:
    """Kernels and groups of kernels per step, longest first, and the runtime's calls per step.

    ``launches``: the products of a step, see ``captured_products``.
    """
    call(new_tokens)
    short, long = (Profile.of(call, length, device) for length in (max(new_tokens // 4, 2), new_tokens))
    if long.steps <= short.steps:
        raise ValueError(f"{new_tokens} new tokens are no more steps than a quarter of them: ask for more")
    timed = long.products[-len(launches) * long.steps :] if launches else ()
    return {
        **between(short, long, floor, bandwidth),
        "products": by_weights(launches, timed, bandwidth),
    }


def between(short: Profile, long: Profile, floor: Floor, bandwidth: float) -> dict[str, Any]:
    """What a step of ``long`` takes, by what it has more than ``short``."""
    steps = long.steps - short.steps
    kernels: list[dict[str, Any]] = [
        {"name": name, "group": group_of(name), **_difference(short, long, name, steps)}
        for name in long.kernels
    ]
    kernels = [each for each in kernels if each["count"] > 0]
    kernels.sort(key=lambda each: -each["microseconds"])
    return {
        "kernels": kernels,
        "groups": _groups(kernels, floor, bandwidth),
        "kernels_per_step": sum(each["count"] for each in kernels),
        "microseconds_per_step": sum(each["microseconds"] for each in kernels),
        **_calls_per_step(short, long, steps),
    }


def calls_per_step(call: Call, device: str) -> dict[str, float]:
    """The runtime's calls per step of a way that tells its steps, from two short calls."""
    short, long = (Profile.of(call, length, device) for length in CALLS_OF)
    return _calls_per_step(short, long, max(long.steps - short.steps, 1))


def _calls_per_step(short: Profile, long: Profile, steps: float) -> dict[str, float]:
    kinds = {"synchronising": STOPS, "event_waits": WAITS, "launches": LAUNCHES}
    return {f"{kind}_per_step": _calls(short, long, names, steps) for kind, names in kinds.items()}


def group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS if re.search(pattern, name))


def _difference(short: Profile, long: Profile, name: str, steps: float) -> dict[str, float]:
    count, time = long.kernels[name]
    count_before, time_before = short.kernels.get(name, (0, 0.0))
    return {"count": (count - count_before) / steps, "microseconds": (time - time_before) / steps}


def _groups(kernels: list[dict[str, Any]], floor: Floor, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(name for name, _ in GROUPS):
        mine = [each for each in kernels if each["group"] == name]
        time = sum(each["microseconds"] for each in mine)
        moved = sum(getattr(floor, part) for part in MOVED.get(name, ()))
        row = {"name": name, "count": sum(each["count"] for each in mine), "microseconds": time}
        if moved:
            row["bytes"] = moved
        # On a busy machine, a difference of two profiles can be nothing or less.
        if moved and time > 0:
            row["share_of_bandwidth"] = moved / (time * 1e-6) / bandwidth
        rows.append(row)
    return sorted(rows, key=lambda each: -each["microseconds"])


def _calls(short: Profile, long: Profile, names: tuple[str, ...], steps: float) -> float:
    return sum(long.runtime.get(name, 0) - short.runtime.get(name, 0) for name in names) / steps


def text(found: dict[str, Any], step_ms: float, most: int = 40) -> str:
    """The groups, then the kernels, and what of the step's wall clock no kernel explains."""
    total = found["microseconds_per_step"]
    lines = [
        f"step {1e3 * step_ms:.0f} us unprofiled; {found['kernels_per_step']:.0f} kernels, {total:.0f} us; "
        f"{found['launches_per_step']:.1f} launches, {found['event_waits_per_step']:.1f} waits for an event, "
        f"{found['synchronising_per_step']:.1f} synchronising calls",
        f"{'us/step':>10}{'share':>7}{'count':>8}{'of bandwidth':>13}  group, then kernel",
    ]
    for row in [*found["groups"], *found.get("products", []), *found["kernels"][:most]]:
        speed = f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else ""
        lines.append(
            f"{row['microseconds']:10.1f}{row['microseconds'] / total:7.1%}{row['count']:8.1f}{speed:>13}"
            f"  {row['name'][:100]}"
        )
    return "\n".join(lines)
