"""What the command line shows, and the files it opens."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from cme_reward.errors import CMEError, InputError

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def clean_errors(err: Console, output: str = "-") -> Iterator[None]:
    """Ends the program with a message, not a traceback, for errors that are the user's to solve."""
    try:
        yield
    except KeyboardInterrupt:
        say(err, "interrupted", "red")
        status = 130  # what shells report for Ctrl-C
    except BrokenPipeError:
        # The reader has gone, as `head` does; closing standard output must not raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # what shells report for it
    except (CMEError, OSError, EOFError) as error:  # EOFError: a compressed file that was cut off
        say(err, f"error: {error}", "red")
        status = 2
    else:
        return
    from cme_reward.cli.jsonl import partial_path

    if output != "-" and partial_path(Path(output)).exists():
        say(err, f"the rows scored so far are in {partial_path(Path(output))}")
    raise typer.Exit(status)


@contextmanager
def busy(err: Console, quiet: bool, what: str) -> Iterator[None]:
    """Says what is waited for, where someone is looking; models load with `nothing_on_stdout`."""
    with nothing_on_stdout(), ExitStack() as stack:
        if not quiet and err.is_terminal:
            stack.enter_context(err.status(what))
        yield


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Standard output is for results; what native code prints meanwhile goes to standard error.

    tokenizers prints a warning there, about a vocabulary with holes (Gemma's), past Python.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (AttributeError, OSError):  # closed: there is nothing to keep clean
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def progress(err: Console, quiet: bool, source: BinaryIO) -> Iterator[Callable[[int, float], None]]:
    """A bar of rows, where someone is looking; yields what advances it."""
    if quiet or not err.is_terminal:
        yield lambda rows, speed: None
        return
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn("Scoring"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("rows  {task.fields[speed]:,.0f} tokens/s"),
        bars.TimeElapsedColumn(),
        console=err,
    )
    total = None
    if source.seekable():
        start = source.tell()
        total = sum(1 for line in source if line.strip())
        source.seek(start)
    with bar:
        task = bar.add_task("", total=total, speed=0.0)
        yield lambda rows, speed: bar.update(task, advance=rows, speed=speed)


@contextmanager
def counting(err: Console, quiet: bool, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of so many steps, where someone is looking; yields what takes one, with a note."""
    if quiet or not err.is_terminal:
        yield lambda note: None
        return
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=err,
    )
    with bar:
        task = bar.add_task("", total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def require_place(option: str, path: Path | None) -> None:
    """That a file can be written there, before there is anything to write.

    Raises:
        InputError: it is a directory, or in one that does not exist.
    """
    if path is not None and path.is_dir():
        raise InputError(f"{option} {path}: is a directory; expected a file")
    if path is not None and not path.resolve().parent.is_dir():
        raise InputError(f"{option} {path}: the directory {path.parent} does not exist")


@contextmanager
def open_input(file: str, err: Console) -> Iterator[Any]:
    """A file of bytes, by its name unpacked where it is compressed; - is standard input."""
    if file == "-":
        if sys.stdin.isatty():
            say(err, "Reading rows from the terminal; Ctrl-D ends them.")
        yield sys.stdin.buffer
        return
    try:
        opened = gzip.open if file.endswith(".gz") else open
        stream = opened(file, "rb")
    except OSError as error:
        raise InputError(f"cannot read {file!r}: {error.strerror}") from error
    with stream:
        yield stream


@contextmanager
def open_output(output: str, shown: bool, err: Console) -> Iterator[Any]:
    from cme_reward.cli.jsonl import whole_file

    if output != "-":
        with whole_file(Path(output)) as stream:
            yield stream
    elif shown and sys.stdout.isatty():
        say(err, "The rows themselves are not printed here; --output FILE.jsonl keeps them.")
        with open(os.devnull, "wb") as stream:
            yield stream
    else:
        yield sys.stdout.buffer
