"""Where the time of a step goes: profiles of a call and of a longer one, whose difference is steps."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

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
# Calls of the runtime that wait for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
GRAPH_LAUNCH = "cudaGraphLaunch"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", GRAPH_LAUNCH)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one call: kernel -> (times run, microseconds), the runtime's calls -> times made, and steps."""

    kernels: dict[str, tuple[int, float]]
    runtime: dict[str, int]
    counted: int

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
            if event.key in (*WAITS, *LAUNCHES):
                runtime[event.key] = event.count
            elif event.is_user_annotation:
                continue
            elif cuda and event.device_type == DeviceType.CUDA:
                kernels[event.key] = event.count, event.self_device_time_total
            elif not cuda:
                kernels[event.key] = event.count, event.self_cpu_time_total
        if outcome.steps is None:
            raise ValueError("a profile needs a way that tells its steps")
        return cls(kernels, runtime, outcome.steps.count)


def per_step(call: Call, new_tokens: int, device: str, floor: Floor, bandwidth: float) -> dict[str, Any]:
    """Kernels and groups of kernels per step, longest first, and the runtime's calls per step."""
    call(new_tokens)
    short, long = (Profile.of(call, length, device) for length in (max(new_tokens // 4, 2), new_tokens))
    if long.steps <= short.steps:
        raise ValueError(f"{new_tokens} new tokens are no more steps than a quarter of them: ask for more")
    return between(short, long, floor, bandwidth)


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
        "waits_per_step": _calls(short, long, WAITS, steps),
        "launches_per_step": _calls(short, long, LAUNCHES, steps),
    }


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
        f"{found['launches_per_step']:.1f} launches and {found['waits_per_step']:.1f} waits",
        f"{'us/step':>10}{'share':>7}{'count':>8}{'of bandwidth':>13}  group, then kernel",
    ]
    for row in [*found["groups"], *found["kernels"][:most]]:
        speed = f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else ""
        lines.append(
            f"{row['microseconds']:10.1f}{row['microseconds'] / total:7.1%}{row['count']:8.1f}{speed:>13}"
            f"  {row['name'][:100]}"
        )
    return "\n".join(lines)
