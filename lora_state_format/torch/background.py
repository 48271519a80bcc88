"""Writing behind the run: the state is copied out while training stands still, and written while it goes on."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
from collections.abc import Callable

from lora_state_format.format.writing import Written

__all__ = ["BackgroundSave", "settle", "start"]

logger = logging.getLogger("lora_state_format")

_lock = threading.Lock()
_last: BackgroundSave | None = None


class BackgroundSave:
    """A save whose bytes are being written. There is one at a time, and the program does not end before it is done.

    A failure is logged at once, and raised by ``wait`` and by the next ``save_optimizer``, whichever comes first. If
    neither comes, it is the last that the program says.
    """

    def __init__(self, write: Callable[[], Written]) -> None:
        self._write = write
        self._written: Written | None = None
        self._error: BaseException | None = None
        self.seen = False
        self._thread = threading.Thread(target=self._run, name="lora_state_format save")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._written = self._write()
        except BaseException as error:
            logger.error("a save in the background failed: %s: %s", type(error).__name__, error)
            self._error = error
        finally:
            del self._write  # and with it the copy of the state

    @property
    def done(self) -> bool:
        """Whether nothing is being written any more."""
        return not self._thread.is_alive()

    def wait(self) -> Written:
        """Wait until the file is on the disk and return what was written. Raises what writing raised."""
        self._thread.join()
        self.seen = True
        if self._error is not None:
            raise self._error
        assert self._written is not None
        return self._written


@atexit.register
def _say_last() -> None:
    """Say at the end of the program that the last save failed, if nobody has been told."""
    last = _last
    if last is None or last.seen:
        return
    try:
        last.wait()
    except BaseException as error:
        sys.stderr.write(
            f"lora_state_format: the last save in the background failed, and nothing waited for it: "
            f"{type(error).__name__}: {error}\n"
        )


def settle() -> None:
    """Wait for the save that is being written, if there is one. Raises its error if nobody has seen it yet."""
    with _lock:
        _settle()


def _settle() -> None:
    global _last
    last, _last = _last, None
    if last is not None and not last.seen:
        last.wait()


def start(prepare: Callable[[], Callable[[], Written]]) -> BackgroundSave:
    """Let ``prepare`` copy a state out, and write it with what it returns.

    ``settle`` comes first, so that only one copy is held and no path has two writers.
    """
    global _last
    with _lock:
        _settle()
        _last = BackgroundSave(prepare())
        return _last
