"""How long to go on trying, and how long to pause between two tries."""

import random
import time
from collections.abc import Callable


class Patience:
    """Grows impatient from the first failure on; a success makes it forget.

    Args:
        limit_s: time after which there is no further try; None: never.
        first_pause_s: before the second try.
        longest_pause_s: the pauses double up to this.
        on_first_pause: called before the first pause after a success.
    """

    def __init__(
        self,
        limit_s: float | None,
        *,
        first_pause_s: float = 0.05,
        longest_pause_s: float = 2.0,
        on_first_pause: Callable[[], None] | None = None,
    ) -> None:
        self._on_first_pause = on_first_pause
        self._limit_s = limit_s
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self.renew()

    def renew(self) -> None:
        """Forget earlier failures."""
        self._started: float | None = None
        self._pause_s = self._first_pause_s

    def pause(self, at_least_s: float = 0.0) -> bool:
        """Wait before the next try; return False, at once, if there is to be none."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
            if self._on_first_pause is not None:
                self._on_first_pause()
        pause_s = max(at_least_s, self._pause_s * random.uniform(0.75, 1.25))  # noqa: S311 - only spreads the tries
        if self._limit_s is not None and now + pause_s > self._started + self._limit_s:
            return False
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        return True
