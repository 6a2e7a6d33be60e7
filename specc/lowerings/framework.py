"""Operators with one meaning and several providers, and the chooser that picks among them.

An operator is a schema with declared mutation, a reference in plain PyTorch that defines what it
means, a fake kernel, and providers. A provider says, on real or fake arguments, why it cannot serve
a call, or that it can. The chooser takes the supporting provider of the highest priority and keeps
the reasons of the others, so that dumps and ``specc doctor`` can print them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from specc.compat import OpOverload
from specc.errors import ProviderError

NAMESPACE = "specc"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Reason = str | None


def always(*_args: Any) -> Reason:
    return None


@dataclasses.dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    ``supports(*args)`` returns why this provider cannot serve the call, or None, and ``pays(*args)`` why
    another would be faster; both must work on fake tensors. ``inline`` providers are plain PyTorch: compiled
    graphs take their body instead of a call, so that Inductor can fuse it.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., Reason]
    priority: int = 0
    inline: bool = False
    pays: Callable[..., Reason] = always


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the chooser took for one call, and why it passed over the others."""

    op: str
    provider: Provider
    refused: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return self.provider.name + (f" ({others})" if others else "")


@dataclasses.dataclass(frozen=True)
class Op:
    """A registered operator; calling it calls ``torch.ops.specc.<name>``.

    ``sample(device)`` makes the arguments of a typical call, real or, in a fake mode, fake.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    sample: Callable[[str], tuple[Any, ...]]
    providers: tuple[Provider, ...]

    @property
    def overload(self) -> OpOverload:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def mutates(self) -> bool:
        return self.overload._schema.is_mutable

    def provider_overload(self, provider: Provider) -> OpOverload:
        """``torch.ops.specc.<name>.<provider>``: this operator, by this provider whatever others say."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).__getattr__(provider.name)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def forced(self, provider: str | None) -> Callable[..., Any]:
        """This operator by one provider, for calls outside of graphs; None leaves the choice open."""
        if provider is None:
            return self.overload
        return lambda *args: self.choose(*args, forced=provider).provider.run(*args)

    def choose(self, *args: Any, forced: str | None = None) -> Decision:
        """The provider for this call, by priority among those that support it and pay.

        A forced one need not pay. Raises ProviderError if it (or, unforced, every one) refuses the call.
        """
        refused: list[tuple[str, str]] = []
        for provider in sorted(self.providers, key=lambda p: -p.priority):
            if forced is not None and provider.name != forced:
                continue
            reason = provider.supports(*args) or (None if forced else provider.pays(*args))
            if reason is None:
                return Decision(self.name, provider, tuple(refused))
            refused.append((provider.name, reason))
        why = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise ProviderError(f"no provider of specc::{self.name} supports this call ({why})")


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    sample: Callable[[str], tuple[Any, ...]],
    providers: tuple[Provider, ...] = (),
) -> Op:
    """Register ``specc::name`` with its reference as the provider of last resort.

    ``schema`` is the part after the name, e.g. ``"(Tensor logits) -> Tensor"``; mutated arguments are
    declared there (``Tensor(a!)``).
    """
    base = Provider("reference", reference, always, priority=-1, inline=True)
    op = Op(name, schema, reference, sample, (*providers, base))
    _register(name, schema, lambda *args: op.choose(*args).provider.run(*args), fake)
    for provider in op.providers:
        _register(f"{name}.{provider.name}", schema, provider.run, fake)
    REGISTRY[name] = op
    return op


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, fake, "Meta")
