"""``specc doctor``: what this machine has, what specc would use of it, and what is in the way."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from specc.errors import ProviderError

OLDEST = {"torch": (2, 11), "transformers": (5, 17)}
SHOWN = (
    "torch-specc",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "gguf",
    "safetensors",
    "tokenizers",
    "amd-aiter",
    "torch-npu",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    what: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Device:
    """A device specc could run on. ``kind`` as in specc's tables: cpu, cuda, hip, npu."""

    kind: str
    name: str
    facts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class OpChoice:
    """The provider an operator takes on a device kind, and why not the others."""

    op: str
    device: str
    provider: str | None
    refused: dict[str, str]
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the doctor found. ``inductor_obstacle``: why Inductor cannot build for the CPU, if so."""

    platform: str
    python: str
    versions: dict[str, str | None]
    devices: list[Device]
    inductor_obstacle: str | None
    backend_listed: bool
    ops: list[OpChoice]
    problems: list[Problem]

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def text(self) -> str:
        """For a person: one section per subject, problems last."""
        found = [f"{name} {version or 'not installed'}" for name, version in self.versions.items()]
        sections = {
            "system": [self.platform, f"python {self.python}"],
            "packages": found,
            "devices": [_device_line(each) for each in self.devices] or ["unknown"],
            "torch.compile": [
                f"backend 'specc' is {'listed' if self.backend_listed else 'not listed'}",
                f"Inductor on the CPU: {self.inductor_obstacle or 'can build'}",
            ],
            "operators": [_op_line(each) for each in self.ops] or ["unknown"],
            "problems": [f"{each.what}: {each.remedy}" for each in self.problems] or ["none"],
        }
        lines = []
        for title, rows in sections.items():
            lines += [title, *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def examine() -> Report:
    """Look at this process and machine. Never raises for what it finds."""
    installed = installed_distributions()
    versions = {name: installed.get(name) for name in SHOWN}
    problems = package_problems(installed, has_npu=_has_npu())
    report = functools.partial(
        Report,
        platform=f"{platform.system()} {platform.machine()} {platform.release()}",
        python=platform.python_version(),
        versions=versions,
    )
    if "torch" not in installed:
        return _without_torch(report, problems)
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return _without_torch(report, [*problems, _broken_torch(error)])
    from specc import compat

    # The metadata leaves out which build it is, CPU, CUDA or ROCm.
    versions["torch"] = torch.__version__
    listed = "specc" in torch.compiler.list_backends()
    if not listed:
        problems.append(_UNLISTED)
    obstacle = compat.cpp_compiler_obstacle()
    devices = _devices()
    return report(
        devices=devices,
        inductor_obstacle=obstacle,
        backend_listed=listed,
        ops=[choice for kind in dict.fromkeys(each.kind for each in devices) for choice in choices_on(kind)],
        problems=problems,
    )


_UNLISTED = Problem(
    "torch does not list the backend 'specc'",
    "its entry point is missing; reinstall with pip install torch-specc (pip install -e . in a checkout)",
)


def _without_torch(report: Callable[..., Report], problems: list[Problem]) -> Report:
    return report(
        devices=[],
        inductor_obstacle="torch cannot be imported",
        backend_listed=False,
        ops=[],
        problems=problems,
    )


def _broken_torch(error: Exception) -> Problem:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return Problem(f"import torch fails ({reason[0]})", "see the other problems, else reinstall torch")


# --- packages -----------------------------------------------------------------------------------


def installed_distributions() -> dict[str, str]:
    """Canonical distribution name -> version, of everything this Python sees."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return found


def package_problems(installed: Mapping[str, str], *, has_npu: bool) -> list[Problem]:
    """Packages that are missing, too old, or not what their name suggests.

    installed: canonical distribution name -> version, as ``installed_distributions`` returns them.
    """
    problems = [
        _too_old(name, installed.get(name), oldest)
        for name, oldest in OLDEST.items()
        if _release(installed.get(name, "0")) < oldest
    ]
    if "aiter" in installed:
        problems.append(
            Problem(
                "the package aiter is not AMD's: it holds tools for async iterators",
                "pip uninstall aiter; AMD's kernels are in the package amd-aiter",
            )
        )
    if "specc" in installed:
        problems.append(
            Problem(
                "the package specc is another project, and writes into the same folder as torch-specc",
                "pip uninstall specc, then reinstall torch-specc",
            )
        )
    if "torch-npu" in installed and not has_npu:
        problems.append(
            Problem(
                "torch-npu is installed, but there is no NPU: it makes import torch fail",
                "pip uninstall torch-npu, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0",
            )
        )
    return problems


def _too_old(name: str, version: str | None, oldest: tuple[int, int]) -> Problem:
    wanted = ".".join(map(str, oldest))
    found = f"{name} is not installed" if version is None else f"{name} {version} is too old"
    return Problem(found, f"pip install '{name}>={wanted}'")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# --- devices ------------------------------------------------------------------------------------


def _has_npu() -> bool:
    return any(Path("/dev").glob("davinci[0-9]*"))


def _devices() -> list[Device]:
    import torch

    threads = {"cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    found = [Device("cpu", _cpu_name(), threads)]
    if torch.cuda.is_available():
        found += [_gpu(index) for index in range(torch.cuda.device_count())]
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        found += [Device("npu", npu.get_device_name(i), {}) for i in range(npu.device_count())]
    return found


def _gpu(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    memory = {"memory": f"{properties.total_memory / 2**30:.0f} GiB"}
    if torch.version.hip is not None:
        return Device("hip", properties.name, {"arch": properties.gcnArchName, **memory})
    capability = f"{properties.major}.{properties.minor}"
    return Device("cuda", properties.name, {"capability": capability, **memory})


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_line(device: Device) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in device.facts.items())
    return f"{device.kind}: {device.name}" + (f" ({facts})" if facts else "")


# --- operators ----------------------------------------------------------------------------------


def choices_on(kind: str) -> list[OpChoice]:
    """What every registered operator would take on a device kind, asked with fake tensors."""
    from specc.compat import fake_mode
    from specc.lowerings import REGISTRY

    device = "cuda" if kind == "hip" else kind
    with fake_mode():
        return [_choice(name, kind, device) for name in sorted(REGISTRY)]


def _choice(name: str, kind: str, device: str) -> OpChoice:
    from specc.lowerings import REGISTRY

    op = REGISTRY[name]
    try:
        decision = op.choose(*op.sample(device))
    except ProviderError as error:
        return OpChoice(name, kind, None, {}, str(error))
    return OpChoice(name, kind, decision.provider.name, dict(decision.refused))


def _op_line(choice: OpChoice) -> str:
    refused = "; ".join(f"not {name}: {reason}" for name, reason in choice.refused.items())
    taken = choice.provider or choice.note
    return f"{choice.op} on {choice.device}: {taken}" + (f" ({refused})" if refused else "")
