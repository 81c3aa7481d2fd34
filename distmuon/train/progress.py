"""The progress line of a run."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Progress on one line: a tqdm bar on a terminal, otherwise a plain line now and then.

    Args:
        total: steps of the whole run.
        initial: steps already done, e.g. before a resumption.
        enabled: false on every rank but one.
        stream: where to write; standard error by default.
        interval: seconds between plain lines; every 5 % of the steps there is one in any case.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval: float = 10.0,
    ) -> None:
        self._total, self._initial, self._interval, self._enabled = total, initial, interval, enabled
        self._stream = stream if stream is not None else sys.stderr
        bar = enabled and self._stream.isatty()
        self._bar = tqdm(total=total, initial=initial, file=self._stream, dynamic_ncols=True, disable=not bar)
        self._started = self._printed_at = time.monotonic()
        self._printed = initial

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show that ``step`` steps are done, the loss (nats per token) and the speed (tokens per second)."""
        shown = f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        due = now - self._printed_at >= self._interval or (step - self._printed) * 20 >= self._total
        if self._enabled and (due or step >= self._total):
            self._printed, self._printed_at = step, now
            self.note(
                tqdm.format_meter(
                    step,
                    self._total,
                    now - self._started,
                    initial=self._initial,
                    postfix=shown,
                    bar_format="{percentage:3.0f}% step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                )
            )

    def note(self, text: str) -> None:
        """Write one line above the bar, e.g. the result of an evaluation."""
        if not self._bar.disable:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
