"""Private torch and transformers imports, in one place, with the versions they were seen in.

Everything here is import-time light: each function imports what it names when it is called.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import os
import sys
import sysconfig
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket

# --- torch 2.11 and 2.13 ------------------------------------------------------------------------


def aot_compile(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    training: Callable[..., Any],
    inference: Callable[..., Any],
    functionalize: bool,
) -> Callable[..., Any]:
    """AOT Autograd without decompositions; ``inference(aten_gm, fake_inputs)`` compiles the graph."""
    from torch._functorch.aot_autograd import aot_module_simplified

    return aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=training,
        bw_compiler=training,
        inference_compiler=inference,
        keep_inference_input_mutations=True,
        disable_functionalization=not functionalize,
    )


def cacheable(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a compiler whose result is an OutputCode, so that torch may keep it on disk."""
    from torch._functorch.aot_autograd import SerializableAOTDispatchCompiler
    from torch._inductor.output_code import OutputCode

    return SerializableAOTDispatchCompiler(OutputCode, compiler)


@contextlib.contextmanager
def cache_salt(key: str, functions: Mapping[str, str]) -> Iterator[None]:
    """Make ``key`` part of torch's cache key, and let graphs that call ``functions`` be cached."""
    import torch._inductor.config as inductor_config

    salted = {
        **inductor_config.unsafe_marked_cacheable_functions,
        **functions,
        "specc.passes": key,
    }
    with inductor_config.patch(unsafe_marked_cacheable_functions=salted):
        yield


def inductor_compile(
    aten_gm: torch.fx.GraphModule,
    fake_inputs: list[Any],
    config_patches: Mapping[str, Any],
) -> Any:
    """Retrace with Inductor's decompositions, then hand the graph to Inductor."""
    import torch._inductor.config as inductor_config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.utils import BoxedBool
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    metadata = TracingContext.get().fw_metadata
    static_inputs = metadata.static_input_indices if metadata is not None else []
    with preserve_node_meta(), inductor_config.patch(dict(config_patches)):
        run = torch.fx.Interpreter(aten_gm).run
        lowered = make_fx(run, decomposition_table=select_decomp_table())(*fake_inputs)
        return compile_fx_inner(
            lowered,
            fake_inputs,
            is_inference=True,
            static_input_idxs=tuple(static_inputs),
            cudagraphs=BoxedBool(False),
        )


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    return make_boxed_func(function)


def inductor_mode_patches(mode: str) -> dict[str, Any]:
    """The Inductor settings behind ``torch.compile(mode=...)``."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def known_inductor_settings(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``wanted`` that this torch's Inductor has."""
    import torch._inductor.config as inductor_config

    known = inductor_config.get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}


def cpp_compiler_obstacle() -> str | None:
    """Why Inductor cannot build C++ here, or None. Its kernels are Python modules: they need Python.h."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"there is no {header} (Debian and Ubuntu: apt install python3-dev)"


def fake_mode() -> Any:
    """A mode in which tensors have shapes, dtypes and devices, but no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=False)


def no_modes() -> Any:
    """Leave the fake and functional modes of a compile that is under way: tensors are real again."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def hint(size: int | torch.SymInt) -> int:
    """The value a size had when its graph was captured, without a guard on it."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    assert value is not None, f"{size} has no hint"
    return int(value)


def bounds(value: torch.SymInt) -> tuple[int, int | None]:
    """The least and the greatest value that a graph's guards let a symbolic number have; None: no bound."""
    import sympy  # type: ignore[import-untyped]

    ranges = value.node.shape_env.bound_sympy(value.node.expr)
    low, high = (int(end) if isinstance(end, sympy.Integer) else None for end in (ranges.lower, ranges.upper))
    return low or 0, high


def is_size(value: torch.SymInt, size: int | torch.SymInt) -> bool:
    """Whether two symbolic sizes are the same expression."""
    return not isinstance(size, int) and bool(value.node.expr == size.node.expr)


def _symbolic(values: list[Any], *, strides: bool = True) -> Iterator[torch.SymInt]:
    for value in values:
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        steps = value.stride() if strides and isinstance(value, torch.Tensor) else ()
        yield from (size for size in (*sizes, *steps) if isinstance(size, torch.SymInt))


def symbols_in(values: list[Any]) -> set[Any]:
    """The symbols in symbolic numbers, and in the sizes and strides of tensors."""
    return {symbol for size in _symbolic(values) for symbol in size.node.expr.free_symbols}


def plain_symbols_in(values: list[Any]) -> set[Any]:
    """Those of the symbols that are by themselves a number, or a size of a tensor."""
    return {size.node.expr for size in _symbolic(values, strides=False) if size.node.expr.is_Symbol}


def settled_sizes(values: list[Any]) -> tuple[int, ...]:
    """A mark that changes when something more is settled of the symbolic sizes among ``values``."""
    environments = {id(size.node.shape_env): size.node.shape_env for size in _symbolic(values)}
    return tuple(len(each.guards) + len(each.replacements) for each in environments.values())


_TWINS = itertools.count()


def fresh_code(function: types.FunctionType) -> types.FunctionType:
    """A copy of ``function`` with a code object of its own.

    Dynamo keeps compiled graphs, and counts recompiles, per code object: two models that share one
    would share its limit. What it learns of numbers that change goes by file, line and name: the second
    model's scales would be taken for variables, were its name not its own.
    """
    twin = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_TWINS)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def dynamo_errors() -> tuple[type[Exception], ...]:
    """What a torch.compile'd call raises when the capture or the backend fails."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return (TorchDynamoException, FailOnRecompileLimitHit)


def is_recompile_limit(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return isinstance(error, FailOnRecompileLimitHit)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Keep a size symbolic where that is possible, so that another one does not recompile."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN's inner product, float32 on a CPU. x: [M, K]; weight: [N, K] contiguous; bias: [N] or None."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def uncompiled(model: Any) -> Any:
    """The module behind ``torch.compile(module)``, ``module.compile()`` or a compiled ``module.forward``.

    specc captures forwards itself, over a cache that is made outside of any graph. A compiled forward
    is undone on a shallow copy, the same one each time; the module passed in stays as it is.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, torch.nn.Module):
        return model
    forward = vars(model).get("forward")
    original = getattr(forward, "_torchdynamo_orig_callable", None)
    if original is None and model._compiled_call_impl is None:
        return model
    if model not in _UNCOMPILED:
        plain = copy.copy(model)
        plain._compiled_call_impl = None
        if original is not None:
            del plain.forward
            if getattr(original, "__func__", None) is not type(model).forward:
                plain.forward = original
        _UNCOMPILED[model] = plain
    return _UNCOMPILED[model]


_UNCOMPILED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def user_line(error: Exception) -> str:
    """The line of Python at which Dynamo gave up, as ``file:line: code``."""
    stack = getattr(error, "real_stack", None)
    if not stack:
        return "unknown source"
    frame = stack[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def serving_code(function: types.FunctionType, *args: Any) -> types.CodeType | None:
    """The compiled code that a call of ``function`` would run; None for none yet. torch 2.11 and 2.13."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = dict(zip(names, args, strict=True))
    entries = _debug_get_cache_entry_list(function.__code__)
    return next((entry.code for entry in entries if entry.guard_manager.check(values)), None)


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module and those in it hold: parameters, buffers, plain attributes, by name.

    Of a tensor that wraps others (quantised weights), those others.
    """
    for path, each in module.named_modules():
        held = {**each._parameters, **each._buffers, **vars(each)}
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                yield from _unwrapped(f"{path}.{name}" if path else name, value)


def _unwrapped(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _unwrapped(f"{name}.{part}", getattr(tensor, part))


def shows_progress() -> bool:
    """Whether transformers would show progress bars. transformers 5.17 to 5.23."""
    from transformers.utils.logging import is_progress_bar_enabled

    return is_progress_bar_enabled()


def end_allocations(device: int, pool: tuple[int, int]) -> None:
    """What ending a capture leaves out where it fails: the allocator goes on serving it. torch 2.11, 2.13."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)


def innermost_line(error: BaseException) -> str:
    """Where an error came up, as ``file:line: code``: the last line of a model or a user, and torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown source"
    users = [frame for frame in frames if not frame.filename.startswith(_OWN_FOLDERS)]
    innermost = frames[-1]
    shown = [innermost] if not users or users[-1] is innermost else [users[-1], innermost]
    return ", in ".join(f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in shown)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_OWN_FOLDERS = tuple(str(Path(each).parent) + os.sep for each in (torch.__file__, __file__))


def captured_for_specc() -> bool:
    """Whether Dynamo is capturing the caller for a backend that wants leaves whole (``captures_leaves``).

    Traced code gets the answer as a constant. Dynamo keeps graphs apart by backend, so it needs no guard.
    """
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(dynamo.tls, "current_tx", None) if dynamo is not None else None
    backend = translator.output.compiler_fn if translator is not None else None
    while backend is not None:
        if getattr(backend, "captures_leaves", False):
            return True
        # Debug wrappers and torch.compile's own stand around a named backend.
        backend = getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "compiler_fn", None))
    return False


# What torch.compiler.assume_constant_result sets; calling it would import Dynamo.
captured_for_specc._dynamo_marked_constant = True  # type: ignore[attr-defined]


def before_each_capture(action: Callable[[], None]) -> None:
    """Call ``action`` before Dynamo looks at a function, whatever the backend, for as long as Python runs."""
    from torch._dynamo.callback import callback_handler

    forget = callback_handler.clear

    def remember() -> None:
        callback_handler.register_start_callback(lambda _: action())

    def clear() -> None:
        forget()
        remember()

    remember()
    # torch.compiler.reset() forgets all callbacks.
    callback_handler.clear = clear  # type: ignore[method-assign]


def compile_id() -> str:
    """The compile that is under way, as torch's logs name it ("0/0"), or "none"."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "none"


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add an artifact to TORCH_TRACE's structured log; ``payload`` is only called if one is kept."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=payload,
    )


# --- transformers 5.17 and 5.23 -----------------------------------------------------------------


def attention_implementation(config: Any) -> str:
    """The name a (text) configuration's model calls its attention by: "sdpa", "eager", ..."""
    return config._attn_implementation


def takes_masks(model: Any) -> bool:
    """Whether the model's attention is transformers' own, which uses the masks it is given."""
    return model._supports_attention_backend


def is_stateful(model: Any) -> bool:
    """Whether the model keeps a recurrent state that a shorter cache does not undo."""
    return getattr(model, "_is_stateful", False)


def is_prepared(config: Any) -> bool:
    """Whether this generation config comes from within ``generate``, with its special tokens as tensors."""
    return hasattr(config, "_eos_token_tensor")


def pad_token(config: Any) -> torch.Tensor | None:
    """The pad token of a prepared generation config."""
    return config._pad_token_tensor


def caller_argument(name: str) -> Any:
    """The local ``name`` of the ``model.generate`` that is calling specc as custom_generate.

    generate drops streamer, assistant_model, tokenizer and synced_gpus on the way to a callable; this
    is the only place where they can still be seen, so that specc can refuse instead of losing them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        local = frame.f_locals
        if frame.f_code.co_name == "generate" and "custom_generate" in local and "self" in local:
            return local.get(name)
        frame = frame.f_back
    return None
