"""Every error specc raises on purpose. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class SpeccError(Exception):
    """Base class of specc's errors."""


class OptionError(SpeccError, ValueError):
    """A compiler or generation option is unknown, ill-typed or out of range."""


class InputError(SpeccError, ValueError):
    """A prompt, model or draft does not fit what specc was asked to do."""


class UnsupportedError(SpeccError, NotImplementedError):
    """The request is well formed, but specc does not do it (yet)."""


class CaptureError(SpeccError, RuntimeError):
    """The model's forward could not be captured as one graph."""


class CompileError(SpeccError, RuntimeError):
    """A captured graph could not be turned into code."""


class StepCaptureError(SpeccError, RuntimeError):
    """A whole step could not be captured as one device graph."""


class PassError(SpeccError, RuntimeError):
    """A compiler pass failed; the graph it was working on is discarded."""


class ProviderError(SpeccError, RuntimeError):
    """No provider of an operator supports the arguments it was called with."""


class PoolError(SpeccError):
    """The pool of keys and values has fewer pages than the batch needs."""
