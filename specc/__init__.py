"""specc compiles speculative decoding for stock Hugging Face models.

Importing this package imports neither torch nor transformers: torch imports it by itself when
``TORCH_LOGS="+specc"`` is set, near the end of its own import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specc.dropin import SpeccOutput, attach, detach, generate
    from specc.errors import (
        CaptureError,
        CompileError,
        InputError,
        OptionError,
        PassError,
        ProviderError,
        SpeccError,
        UnsupportedError,
    )
    from specc.options import Options
    from specc.verify_calls import commit

__version__ = "0.1.0"

_MEMBERS = {
    "specc.errors": (
        "CaptureError",
        "CompileError",
        "InputError",
        "OptionError",
        "PassError",
        "ProviderError",
        "SpeccError",
        "UnsupportedError",
    ),
    "specc.dropin": ("SpeccOutput", "attach", "detach", "generate"),
    "specc.options": ("Options",),
    "specc.verify_calls": ("commit",),
}
_HOMES = {name: module for module, names in _MEMBERS.items() for name in names}

__all__ = [
    "CaptureError",
    "CompileError",
    "InputError",
    "OptionError",
    "Options",
    "PassError",
    "ProviderError",
    "SpeccError",
    "SpeccOutput",
    "UnsupportedError",
    "__version__",
    "attach",
    "commit",
    "detach",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
