"""Keeps native libraries from writing to the terminal."""

import contextlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what the block writes to standard output and error, also from native code.

    The file descriptors 1 and 2 are redirected, since TensorFlow and LiteRT write to them past
    Python. One block at a time; other threads' output is lost while one runs, so keep it short.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()  # what was printed before must not end in the redirected descriptor
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        sink = stack.enter_context(tempfile.TemporaryFile())
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # a program without a terminal may have closed it
                stack.enter_context(_redirected(descriptor, sink.fileno()))
        yield


@contextlib.contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[None]:
    saved = os.dup(descriptor)
    try:
        os.dup2(target, descriptor)
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)
