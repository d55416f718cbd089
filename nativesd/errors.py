"""The errors a caller can expect. Each message is one sentence: what was wrong, where, and what to do."""

from __future__ import annotations


class NativesdError(Exception):
    """Base of every error that nativesd raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 3


class UsageError(NativesdError, ValueError):
    """An option or argument that cannot be: an unknown sampler, a size the model cannot make."""

    exit_code = 2


class SourceError(NativesdError):
    """A file or folder that is missing, unreadable, or not what it has to be."""


class WeightsError(SourceError):
    """Tensors that do not fit the model: missing, left over, of another shape, or claimed twice."""


class NetworkError(NativesdError):
    """The hub could not be reached, or does not have what was asked for."""

    exit_code = 4
