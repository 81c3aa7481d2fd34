"""Collectives under way: what is waited for, and what their failure says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distmuon.clock import InFlight
from distmuon.errors import CollectiveError


class NamedWork:
    """A collective under way whose failure is explained.

    Args:
        work: what to wait for.
        explain: makes the error of a failure.
    """

    def __init__(self, work: InFlight, explain: Callable[[Exception], CollectiveError]) -> None:
        self._work, self._explain = work, explain

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return self._work.is_completed()

    def wait(self) -> None:
        """Wait until it is done.

        Raises:
            CollectiveError: it failed.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._explain(error) from error


class Pending:
    """A collective under way; keeps its buffers alive until waited for.

    Args:
        result: what ``wait`` returns.
        work: what to wait for; None if the result is there.
        buffers: what the collective reads and writes.
        finish: makes the result from what arrived, after the wait.
    """

    def __init__(
        self,
        result: Tensor,
        work: NamedWork | None = None,
        buffers: Sequence[Tensor] = (),
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._buffers = buffers
        self._finish = finish

    def done(self) -> bool:
        """Whether waiting would return at once."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        """Wait for the collective and return its result.

        Raises:
            CollectiveError: it failed.
        """
        if self._work is not None:
            self._work.wait()
            self._work, self._buffers = None, ()
        if self._finish is not None:
            self._result, self._finish = self._finish(self._result), None
        return self._result
