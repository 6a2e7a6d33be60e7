"""The typed options of ``torch.compile(model, backend="specc", options={...})`` and of the drop-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, ItemsView, Mapping
from typing import Any

from specc.errors import OptionError


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_optional_bool(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_optional_str(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_mode(value: object) -> bool:
    return value in (None, "verify")


def _is_commit(value: object) -> bool:
    return value in ("replay", "snapshot")


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_provider_table(value: object) -> bool:
    """A mapping, or the pairs that one is frozen to."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return isinstance(pairs, tuple | ItemsView) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in pairs
    )


def _option(default: Any, accepts: Callable[[object], bool], kind: str, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"accepts": accepts, "kind": kind, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Options:
    """What a compile can be told. Every field is a valid key of ``options={...}``.

    ``inductor``: True or False forces Inductor on or off; None (the default) uses it wherever it can
    build code for the graph's device. Off, the graph runs as captured, with in-place ops in place.

    ``disable_passes``: names of passes to leave out, for finding out what a pass changes.

    ``providers``: operator name -> provider name, to force one (``{"greedy_select": "reference"}``).

    ``dump``: a folder for graph dumps; None takes ``SPECC_DUMP`` from the environment, if set.

    ``max_autotune``: let Inductor time its candidate kernels (longer compiles).

    ``regional``: compile layers that are alike once, and call that code for each of them (the default).
    Compiling a deep model then takes a third to a half of the time. Calls from Python cost a few percent of a
    step on a CPU; a captured step makes none.

    ``mode``: "verify" leaves recurrent states as they are; ``specc.commit`` then takes over as many of the
    block's tokens as were right. Not ``torch.compile(mode=...)``, which may be given beside it.

    ``state_commit``: how that is done. "replay" keeps what each token adds to a state and adds it again;
    "snapshot" keeps the state after each token and copies one.

    ``exact``: a token's bits do not depend on its block, from two rows on: products, reductions and recurrent
    layers sum in one order (in float32, products of many rows are taken in slices), and no kernel is chosen
    by timing. In the drop-in, with compile=True, decoding with and without drafts then gives the same bits.
    None (the default) asks for that in the drop-in where it was measured to cost less than 3 % of a step with
    drafts: one row in bfloat16 on CUDA, compiled by Inductor, without experts, ``providers`` and
    ``max_autotune``.
    """

    inductor: bool | None = _option(
        None, _is_optional_bool, "True, False or None", "use Inductor; None = where it can"
    )
    disable_passes: tuple[str, ...] = _option((), _is_names, "a list of pass names", "passes to leave out")
    providers: tuple[tuple[str, str], ...] = _option(
        (), _is_provider_table, "a dict of op name -> provider name", "providers to force"
    )
    dump: str | None = _option(None, _is_optional_str, "a folder or None", "where to write graph dumps")
    max_autotune: bool = _option(False, _is_bool, "True or False", "let Inductor time candidate kernels")
    regional: bool = _option(True, _is_bool, "True or False", "compile layers that are alike once")
    mode: str | None = _option(None, _is_mode, "'verify' or None", "leave recurrent states to specc.commit")
    state_commit: str = _option(
        "replay", _is_commit, "'replay' or 'snapshot'", "how recurrent states are committed"
    )
    exact: bool | None = _option(
        None,
        _is_optional_bool,
        "True, False or None",
        "a token's bits do not depend on its block; None = where that costs next to nothing",
    )

    @classmethod
    def parse(cls, options: Options | Mapping[str, Any] | None) -> Options:
        """Check ``options`` and freeze them.

        Raises OptionError, listing the valid options, for an unknown name or a value of the wrong type.
        """
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise OptionError(
                f"options must be a dict or specc.Options, got {type(options).__name__}; {_valid()}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError(f"specc has no option {name!r}; {_valid()}")
        return cls(**options)

    def __post_init__(self) -> None:
        """Check each value, and freeze lists and dicts, so that options can be compared and hashed."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.metadata["accepts"](value):
                got = f"got {value!r} ({type(value).__name__})"
                raise OptionError(
                    f"option {field.name!r} must be {field.metadata['kind']}, {got}; {_valid()}"
                )
            object.__setattr__(self, field.name, _freeze(value))

    def fingerprint(self) -> str:
        """Text that differs whenever the code a compile produces may differ (dumping does not)."""
        return repr(dataclasses.replace(self, dump=None))


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, list) else value


def _valid() -> str:
    rows = (
        f"{field.name} ({field.metadata['kind']}: {field.metadata['meaning']})"
        for field in dataclasses.fields(Options)
    )
    return "valid options: " + "; ".join(rows)
