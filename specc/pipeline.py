"""One captured graph to one callable: Dynamo passes, undecomposed ATen passes, Inductor (or not)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from specc import compat, leaves, regions, sources, verify_calls
from specc.errors import OptionError, UnsupportedError
from specc.fixed_reductions import CONFIG as FIXED
from specc.fixed_reductions import fixed_reductions
from specc.lowerings.devices import device_kind
from specc.lowerings.framework import REGISTRY
from specc.options import Options
from specc.passes import PASSES, passes_at, state_commit
from specc.passes.framework import Level, Observer, PassContext, run_passes
from specc.report import check_dump_folder, dump_folder, observers_for

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent


def parse_options(options: Options | Mapping[str, Any] | None) -> Options:
    """``Options.parse``, and what it names exists: passes, operators, the dump folder. Raises OptionError."""
    parsed = Options.parse(options)
    _check_names("pass", parsed.disable_passes, [each.name for each in PASSES])
    _check_names("operator", [op for op, _ in parsed.providers], list(REGISTRY))
    for op, provider in parsed.providers:
        _check_names(f"provider of {op}", [provider], [each.name for each in REGISTRY[op].providers])
    check_dump_folder(parsed)
    return parsed


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise OptionError(f"specc has no {what} {name!r}; it has: {', '.join(dict.fromkeys(known))}")


def compile_graph(
    gm: GraphModule, example_inputs: list[Any], options: Options, mode: str | None
) -> Callable[..., Any]:
    """Compile a Dynamo graph. ``example_inputs`` are its placeholders' values, SymInts among them."""
    _check_verifiable(gm, options)
    sources.remember(gm)
    context = PassContext(options)
    patches = _config_patches(options, mode)
    observers = observers_for(options)
    _run_level("dynamo", gm, context, observers)
    records = state_commit.records_of(gm)
    through_inductor = _wants_inductor(options, example_inputs)

    def compile_one(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if through_inductor:
            return _through_inductor(graph, inputs, context, observers, patches)
        return _as_captured(graph, inputs, context, observers)

    pieces = regions.pieces_of(gm) if options.regional else None
    if pieces is None:
        compiled = compile_one(gm, example_inputs)
    else:
        compiled = regions.compile_pieces(gm, pieces, compile_one)
    return compiled if records is None else verify_calls.recording(compiled, records)


def _check_verifiable(gm: GraphModule, options: Options) -> None:
    reason = leaves.why_graph_unverifiable(gm) if options.mode == "verify" else None
    if reason is not None:
        raise UnsupportedError(
            f"mode='verify': the model {reason}. Feed it one token at a time, without mode"
        )


def _through_inductor(
    gm: GraphModule,
    example_inputs: list[Any],
    context: PassContext,
    observers: Sequence[Observer],
    patches: dict[str, Any],
) -> Callable[..., Any]:
    traced = False

    def inference(aten_gm: GraphModule, fake_inputs: list[Any]) -> Any:
        nonlocal traced
        traced = True
        sources.remember(aten_gm)
        _run_level("aten", aten_gm, context, observers)
        with fixed_reductions() if context.options.exact else contextlib.nullcontext():
            return compat.inductor_compile(aten_gm, fake_inputs, patches)

    # A dump needs the passes to run, so it must not be answered from torch's cache.
    dumping = dump_folder(context.options) is not None
    compiler = inference if dumping else compat.cacheable(inference)
    training = _refuse_training if dumping else compat.cacheable(_refuse_training)
    key = cache_key(context.options, _devices(example_inputs), patches)
    with compat.cache_salt(key, _inline_functions(key)):
        compiled = compat.aot_compile(
            gm, example_inputs, training=training, inference=compiler, functionalize=True
        )
    if not traced:
        log.info("ATen passes did not run: torch's cache had this graph compiled with the same passes")
    return compiled


def _as_captured(
    gm: GraphModule,
    example_inputs: list[Any],
    context: PassContext,
    observers: Sequence[Observer],
) -> Callable[..., Any]:
    def inference(aten_gm: GraphModule, fake_inputs: list[Any]) -> Any:
        _run_level("aten", aten_gm, context, observers)
        return compat.boxed(aten_gm.forward)

    return compat.aot_compile(
        gm, example_inputs, training=_refuse_training, inference=inference, functionalize=False
    )


def _run_level(level: Level, gm: GraphModule, context: PassContext, observers: Sequence[Observer]) -> None:
    for observer in observers:
        observer.graph(level, gm)
    run_passes(gm, passes_at(level), context, observers)


def _refuse_training(gm: GraphModule, inputs: list[Any]) -> Any:
    raise UnsupportedError(
        "specc compiles inference only, and this call needs gradients: "
        "call the model under torch.no_grad() or torch.inference_mode()"
    )


def _wants_inductor(options: Options, example_inputs: list[Any]) -> bool:
    if options.inductor is not None:
        return options.inductor
    devices = _devices(example_inputs)
    if "cpu" not in devices or len(devices) > 1:
        return True
    obstacle = cpp_obstacle()
    return obstacle is None


@functools.cache
def cpp_obstacle() -> str | None:
    """Why Inductor cannot build code for the CPU here, or None. Said once, in one line."""
    obstacle = compat.cpp_compiler_obstacle()
    if obstacle is not None:
        log.warning("specc runs its graphs without Inductor: %s", obstacle)
    return obstacle


def _config_patches(options: Options, mode: str | None) -> dict[str, Any]:
    patches = _mode_patches(mode) if mode else {}
    if patches.pop("triton.cudagraphs", False):
        log.info("mode=%r: specc leaves device graphs to its own runtime", mode)
    if options.max_autotune:
        patches["max_autotune"] = True
    if options.exact:
        if patches.get("max_autotune"):
            log.info("exact: no kernel is chosen by timing, though max_autotune is on")
        patches |= compat.known_inductor_settings(FIXED)
    return patches


def _mode_patches(mode: str) -> dict[str, Any]:
    try:
        return compat.inductor_mode_patches(mode)
    except RuntimeError as error:
        raise OptionError(f"mode={mode!r} is none of torch.compile's modes ({error})") from error


def _devices(example_inputs: list[Any]) -> tuple[str, ...]:
    kinds = {device_kind(x.device) for x in example_inputs if isinstance(x, torch.Tensor)}
    return tuple(sorted(kinds))


def cache_key(options: Options, devices: tuple[str, ...], patches: dict[str, Any]) -> str:
    """Text that changes with everything outside the Dynamo graph that may change the compiled code."""
    order = [f"{each.level}:{each.name}" for each in PASSES]
    parts = [sources_hash(), options.fingerprint(), str(order), str(devices), str(patches)]
    parts += [torch.__version__, platform.machine(), str(torch.version.hip)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def sources_hash() -> str:
    """Hash of every source file that decides what a compile produces."""
    digest = hashlib.sha256()
    folders = (PACKAGE / "passes", PACKAGE / "lowerings")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += [PACKAGE / name for name in ("pipeline.py", "compat.py", "fixed_reductions.py")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _inline_functions(key: str) -> dict[str, str]:
    """Inline providers of mutating ops stay Python functions until AOT: torch must be told their version."""
    return {
        f"{provider.run.__module__}.{provider.run.__qualname__}": key
        for op in REGISTRY.values()
        if op.mutates
        for provider in op.providers
        if provider.inline
    }
