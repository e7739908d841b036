"""The way to the daemon: one session, opened by a thread, and a pause after each failure.

Upstairs:   `mover` takes the session for each call and says how the call went.
Downstairs: the `kvtier` package, when the session is opened.

Invariants kept here
  L1  `session` never waits.
  L2  After a call that failed there is a pause, longer after each that follows, in which there is
      no session: a daemon that hangs costs SGLang's threads a small part of their time.

Not here on purpose
  No retry of a lost session by hand: the SDK opens it again with the next call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSE_MIN_S = 0.5
PAUSE_MAX_S = 15.0

NEEDS_A_NEW_SESSION = ("NamespaceChanged", "LayoutMismatch", "Refused", "Forked")

logger = logging.getLogger("sglang.kvtier")


class Link:
    """One session with the daemon."""

    def __init__(self, open_session: Callable[[], Any], what: str) -> None:
        self._open = open_session
        self._what = what
        self._lock = threading.Lock()
        self._session: Any = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._pause = 0.0
        self._quiet_until = 0.0
        self._is_away = False

    def start(self, wait_s: float = 0.0) -> None:
        """Begins to connect; waits at most `wait_s` for it."""
        with self._lock:
            if self._thread is not None or self._session is not None or self._closed.is_set():
                return
            thread = threading.Thread(target=self._connect, name="kvtier", daemon=True)
            self._thread = thread
        thread.start()
        thread.join(wait_s)

    def session(self) -> Any:
        """The session to call now. None while there is none, and in the pause (L1, L2)."""
        with self._lock:
            quiet = time.monotonic() < self._quiet_until
            return None if quiet or self._closed.is_set() else self._session

    def failed(self, error: BaseException) -> None:
        """A call failed: there is a pause now. A session that can no longer serve is replaced."""
        with self._lock:
            self._pause = min(max(self._pause * 2, PAUSE_MIN_S), PAUSE_MAX_S)
            after = max(self._pause, float(getattr(error, "retry_after", 0.0) or 0.0))
            self._quiet_until = time.monotonic() + min(after, PAUSE_MAX_S)
            dead = type(error).__name__ in NEEDS_A_NEW_SESSION
            if dead:
                self._session = None
        self._away(error)
        if dead:
            self.start()

    def worked(self) -> None:
        """A call worked."""
        with self._lock:
            self._pause, self._quiet_until = 0.0, 0.0
            was_away, self._is_away = self._is_away, False
        if was_away:
            logger.info("kvtier (%s): the daemon can be used again", self._what)

    def close(self) -> None:
        """Gives the session back."""
        self._closed.set()
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _connect(self) -> None:
        pause = PAUSE_MIN_S
        while not self._closed.is_set():
            try:
                session = self._open()
            except Exception as error:  # SGLang goes on without storage, whatever it is
                self._away(error)
                self._closed.wait(pause)
                pause = min(pause * 2, PAUSE_MAX_S)
                continue
            with self._lock:
                closed, self._thread = self._closed.is_set(), None
                if not closed:
                    self._session = session
            if closed:
                session.close()
            else:
                self.worked()
            return

    def _away(self, error: BaseException) -> None:
        """Says once that the daemon is away, and why."""
        with self._lock:
            said, self._is_away = self._is_away, True
        if not said and not self._closed.is_set():
            logger.warning(
                "kvtier (%s): the daemon cannot be used, pages are computed: %s: %s",
                self._what,
                type(error).__name__,
                error,
            )
