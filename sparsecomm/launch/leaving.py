"""How this process leaves its job: notices every way, tells the other ranks, and ends the job after a failure.

A rank that leaves without a word keeps the others waiting until their timeout. So whatever ends this process, the
others get a note with the cause (`sparsecomm/transport/notes.py`), and after a failure they get two seconds to raise an
error of their own before the job ends. What cannot say anything (SIGKILL, a crash) is noticed by the launcher, by
ULFM, or by a broken connection.
"""

from __future__ import annotations

import contextlib
import dis
import io
import os
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

from sparsecomm.errors import ConfigError, RankLeft
from sparsecomm.transport import Engine
from sparsecomm.transport.notes import Note, NoteKind

__all__ = ["Leaving"]

_FIRST_WORD = 2.0  # seconds that other ranks leave rank 0 to report an error of an option; its note may take 1 to leave
_LINGER = 2.0  # seconds for the others to raise their own errors before this rank ends the job
_ORIGIN = 3.0  # seconds for the rank that failed first to end the job with its own status
_CALLBACK = "Got the following error when running the callback: "  # torch's words before an error of the hook,
_CALLBACK_STACK = "\n\nAt:\n"  # and after it


class Leaving:
    """Watches over the ways in which this rank may leave. In a world of one there is nobody to tell.

    Args:
        engine: The rank's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rank, self._size = engine.transport.rank, engine.transport.size
        self._pid = os.getpid()
        self._left = False
        main = threading.main_thread().ident or 0
        self._main = _outermost(sys._current_frames().get(main))
        self._joined_by = threading.current_thread()
        self._old: tuple[Any, Any, Any] | None = None
        if self._size > 1:
            self._old = sys.excepthook, threading.excepthook, os._exit
            sys.excepthook, threading.excepthook = self._uncaught, self._uncaught_in_thread
            os._exit = self._exit_at_once
            with contextlib.suppress(ImportError):  # without the binary an exit counts as one without an error
                from sparsecomm import _core

                _core.watch_exit_status(main)

    def restore(self) -> None:
        """Gives back the hooks of Python that this object has replaced."""
        if self._old is None:
            return
        if sys.excepthook == self._uncaught:  # else the script has set one of its own, which may call ours
            sys.excepthook = self._old[0]
        if threading.excepthook == self._uncaught_in_thread:
            threading.excepthook = self._old[1]
        if os._exit == self._exit_at_once:
            os._exit = self._old[2]
        self._left = True

    def close_engine(self, *, exiting: bool) -> None:
        """Ends the engine. Ends the job instead if this rank must not leave in peace.

        That is so if Python exits with a status other than 0, or if collectives are in flight that never end.

        Args:
            exiting: Whether Python is exiting.
        """
        if exiting and self._size > 1 and not self._left and not self._returned():
            self._end_unless_well()
        label = self._engine.last_label
        if not self._engine.close():
            self._end_the_job(f"ended while {label} was in flight", 1)

    def depart(self) -> None:
        """Waits until the other ranks end, too, and tells them that this one has ended. The engine must be closed."""
        self._left = True
        self._engine.transport.depart(Note(self._rank, NoteKind.ENDED, f"it ended normally{self._where()}"))

    def _returned(self) -> bool:
        return self._main is None or _has_returned(self._main)

    def _end_unless_well(self) -> None:
        """Ends the job unless the SystemExit that ends Python has status 0. No hook of Python sees that exception."""
        try:
            from sparsecomm import _core
        except ImportError:
            return
        noted = _core.noted_exit_status()
        if not noted:
            self._end_the_job("was ended by an exception", 1)
            return
        (code,) = noted
        status = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
        if status:
            self._end_the_job(f"exited with status {status}", status)

    def _where(self) -> str:
        return f" after {self._engine.last_label}" if self._engine.last_label else " before its first exchange"

    def _end_the_job(self, how: str, status: int, *, linger: float = _LINGER) -> None:
        """Tells the others how this rank leaves, gives them time to fail, and ends the job."""
        self._left = True
        blamed = self._engine.breakage.latest
        self._print(f"rank {self._rank} of {self._size} {how}; ending the job on all ranks")
        with contextlib.suppress(Exception):  # a script may have replaced or closed it
            sys.stdout.flush()
        self._engine.leave(Note(self._rank, NoteKind.FAILED, f"it {how}{self._where()}"))
        if isinstance(blamed, RankLeft):
            linger = _ORIGIN if blamed.failed else 0.0
        time.sleep(linger)
        self._engine.transport.abort(status)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Prints an exception that no code has caught, as `sys.excepthook`, and ends the job."""
        if isinstance(error, ConfigError) and self._rank and os.getpid() == self._pid:
            # Rank 0 probably has the same error and ends the job before P ranks have printed the same message.
            time.sleep(_FIRST_WORD)
        assert self._old is not None
        wrapped = error.args and isinstance(error.args[0], str) and error.args[0].startswith(_CALLBACK)
        if wrapped and self._engine.breakage.latest is not None:
            # torch wraps the error of a hook in its text and a stack of threads that tell the user nothing.
            error = self._engine.breakage.latest.with_traceback(trace)
        self._old[0](type(error), error, trace)
        if isinstance(sys.stderr, io.StringIO):  # that of torch's hook, which shows it when this one returns: never
            with contextlib.suppress(Exception):
                shown, sys.stderr = sys.stderr.getvalue(), sys.__stderr__
                print(shown, end="", file=sys.stderr, flush=True)
        if os.getpid() == self._pid and not self._left:  # a forked child may fail without ending the job
            alike = isinstance(error, ConfigError)  # on all ranks, probably
            self._end_the_job(f"failed with {_told(error)}", 1, linger=0.0 if alike else _LINGER)

    def _uncaught_in_thread(self, args: threading.ExceptHookArgs) -> None:
        """Ends the job if the thread trains. Another thread, a logger say, may fail alone."""
        assert self._old is not None
        self._old[1](args)
        error, thread = args.exc_value, args.thread
        trains = thread is not None and (thread is self._joined_by or thread in self._engine.submitters)
        silent = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        if trains and not silent and os.getpid() == self._pid and not self._left:
            assert error is not None
            self._end_the_job(f"failed in a thread with {_told(error)}", 1)

    def _exit_at_once(self, status: int) -> NoReturn:
        """Says goodbye in `os._exit`, after which nothing else of Python runs."""
        assert self._old is not None
        if os.getpid() == self._pid and not self._left:
            self._left = True
            kind = NoteKind.FAILED if status else NoteKind.ENDED
            if status:
                self._print(f"rank {self._rank} of {self._size} called os._exit({status})")
            self._engine.leave(Note(self._rank, kind, f"it called os._exit({status}){self._where()}"))
            time.sleep(_LINGER)
        self._old[2](status)
        raise AssertionError("os._exit does not return")

    @staticmethod
    def _print(text: str) -> None:
        with contextlib.suppress(Exception):  # a script may have replaced or closed it
            print(f"sparsecomm: {text}", file=sys.stderr, flush=True)


def _told(error: BaseException) -> str:
    """Returns kind and message of an exception, without the stack that torch adds to an error of a hook."""
    try:
        text = str(error)
    except Exception:
        return f"{type(error).__name__}, which cannot be printed"
    if text.startswith(_CALLBACK):
        return text.removeprefix(_CALLBACK).split(_CALLBACK_STACK)[0]
    return f"{type(error).__name__}: {text}"


def _outermost(frame: FrameType | None) -> FrameType | None:
    """Returns the frame of the script itself. It shows later how the script has ended."""
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _has_returned(frame: FrameType) -> bool:
    """Returns whether a frame that has ended did so by returning, and not by an exception."""
    last = frame.f_code.co_code[frame.f_lasti] if frame.f_lasti >= 0 else None
    return last is not None and dis.opname[last].startswith("RETURN")
