"""A process that forks off this one, and what it answers."""

from __future__ import annotations

import os
import pickle
import select
import signal
import warnings
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0  # seconds until a child that never answers is called that


def in_a_fork(function: Callable[[], Any]) -> Any:
    """The result of `function` in a forked process; raises what it raises there."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads: the point of it
        child = os.fork()
    if not child:
        status = 1
        try:
            os.close(read)
            try:
                told = pickle.dumps((function(), None))
            except BaseException as error:
                told = pickle.dumps((None, error))
            with os.fdopen(write, "wb") as pipe:
                pipe.write(told)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the forked process waits in vain")
        told = pipe.read()
    os.waitpid(child, 0)
    result, error = pickle.loads(told)
    if error is not None:
        raise error
    return result
