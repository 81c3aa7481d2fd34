"""The errors a user can meet; all are ValueErrors, so ``except ValueError`` catches every one."""

from __future__ import annotations


class DistMuonError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(DistMuonError):
    """A setting is missing, unknown, out of range, or cannot be honoured here."""


class ParameterError(DistMuonError):
    """A parameter or its gradient cannot be optimized as it is (shape, dtype, layout, sharing)."""


class RankMismatchError(DistMuonError):
    """The ranks of a process group disagree about parameters or settings."""


class SynchronizationError(DistMuonError):
    """Gradients, reductions and steps arrived in an order that would give a wrong update."""


class StateError(DistMuonError):
    """A state dict does not belong to this optimizer."""


class DataError(DistMuonError):
    """A data source or tokenizer is missing, unreadable, or not what its hash says."""
