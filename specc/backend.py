"""``torch.compile(model, backend="specc")``: found through its entry point, no import needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from specc import compat, leaves
from specc.errors import OptionError
from specc.pipeline import compile_graph, parse_options


class SpeccBackend:
    """The backend object: callable as torch wants it, and reset by ``torch.compiler.reset()``."""

    # Read while capturing: recurrences stay single nodes for this backend and no other.
    captures_leaves = True

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: list[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> Callable[..., Any]:
        """Compile a captured graph for inference. ``options``: the fields of specc.Options.

        Raises OptionError for options specc does not have; the callable refuses to compute gradients.
        """
        if unknown:
            names = ", ".join(sorted(unknown))
            raise OptionError(f"specc's backend takes mode= and options=, not {names}")
        return compile_graph(gm, example_inputs, parse_options(options), mode)

    def reset(self) -> None:
        """Drop every captured step and compiled forward; torch drops the graphs themselves."""
        for name in ("specc.runtime.workspace", "specc.runtime.compiled"):
            if name in sys.modules:
                sys.modules[name].reset()


specc = SpeccBackend()
# A model may be imported after this module, but not after its first capture.
compat.before_each_capture(leaves.install)
