"""Every judgment on disk the moment it comes, and read again: what was paid for is not lost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cme_reward.errors import InputError
from cme_reward.evaluation.judge import FAILED, UNREADABLE, VERDICTS

NAME = "judgments.jsonl"


class Journal:
    """The judgments of a folder; open it with `open_journal`."""

    def __init__(self, file: BinaryIO, known: dict[str, dict[str, Any]]) -> None:
        self.known = known
        """The last judgment of each key."""
        self._file, self._lock = file, threading.Lock()

    def answered(self, key: str) -> bool:
        """Whether there is a reply; what failed is to be asked again."""
        return key in self.known and self.known[key]["verdict"] != FAILED

    def add(self, judgment: dict[str, Any]) -> None:
        """On the disk when it returns."""
        line = json.dumps(judgment).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.known[judgment["key"]] = judgment


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, which is made where it is missing.

    A last line that was cut off, by a power cut or a kill, is dropped.

    Raises:
        InputError: where another process writes to it, or a whole line is no judgment.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write {path}: {error.strerror}") from error
    with file:
        _lock(file, path)
        file.seek(0)
        content = file.read()
        whole, _, torn = content.rpartition(b"\n")
        known = {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            judgment = _judgment(line)
            if judgment is None:
                raise InputError(
                    f"{path}, line {number}, is no judgment: {line[:60]!r}; delete that line, or "
                    "name another folder with --out"
                )
            known[judgment["key"]] = judgment
        if torn:
            file.truncate(len(content) - len(torn))
        yield Journal(file, known)


def _judgment(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    good = isinstance(value, dict) and isinstance(value.get("key"), str)
    return value if good and value.get("verdict") in (*VERDICTS, UNREADABLE, FAILED) else None


def _lock(file: BinaryIO, path: Path) -> None:
    """Two processes with one journal would pay for everything twice."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another process writes to {path}; wait for it, or name another --out"
        ) from None
