"""The errors a user can meet.

Those that say what to change are ValueErrors, so ``except ValueError`` catches every one; a lost rank is not.
"""

from __future__ import annotations

from collections.abc import Sequence


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


class NonFiniteGradientError(DistMuonError):
    """Gradients were not finite in so many steps in a row that training cannot go on; names the parameters."""


class StateError(DistMuonError):
    """A state dict does not belong to this optimizer."""


class CheckpointError(DistMuonError):
    """A checkpoint could not be written, or is not whole; names the file."""


class DataError(DistMuonError):
    """A data source or tokenizer is missing, unreadable, or not what its hash says."""


class CollectiveError(RuntimeError):
    """A collective failed or timed out; says in which step, phase and bucket, and which ranks are missing.

    No ValueError: those are told to the other ranks before they are raised, and telling them would hang here. The
    connections of the optimizer's groups are closed then, so that every other rank raises too; only a restart helps.

    Args:
        message: the sentence.
        gone: ranks whose connections closed before they said anything.
        silent: ranks that said nothing.
    """

    def __init__(self, message: str, gone: Sequence[int] = (), silent: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.gone = tuple(gone)
        self.silent = tuple(silent)
