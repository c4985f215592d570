"""The command line: `cme-reward report`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cme_reward.cli.terminal import busy, clean_errors, require_place, say, stderr

_output = partial(typer.Option, rich_help_panel="Output")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's log, or its folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another run, drawn over the first.")
    ] = None,
    html: Annotated[Path, _output(metavar="FILE.html", help="Where the page goes.")] = Path(
        "report.html"
    ),
    quiet: Annotated[
        bool, _output("--quiet", "-q", help="Only errors; the exit status tells of signs.")
    ] = False,
) -> None:
    """What happened in a training run? Its metrics as one HTML page, and signs of trouble.

    **RUN** is one of

    - the output folder of TRL, a checkpoint in it, or its `trainer_state.json`
    - the file that veRL writes with `trainer.logger=[console,file]`
    - a folder of TensorBoard's events, as OpenRLHF writes them (needs `pip install tensorboard`)
    - JSON Lines, an object for each step: `{"step": 1, "cme/coverage": 1.0, ...}`

    Looked for: lengths, repetition and entropy that drift, responses that are cut off, a spread
    that vanishes, text the verifier did not score, a reward that is little but length. They compare
    the first tenth of a run with the last. Samples that a trainer kept (the setting `samples`) are
    shown as heat maps, and as the tokens they were rewarded for most and least.

    **Exit status**: 0 no sign of trouble, 1 some, 2 error.

    **Example**: `cme-reward report outputs/run-1 outputs/run-2 --html compare.html`
    """
    err = stderr()
    with clean_errors(err):
        from cme_reward.cli.jsonl import whole_file
        from cme_reward.curves.page import render
        from cme_reward.curves.read import read_run
        from cme_reward.curves.samples import read as read_samples
        from cme_reward.curves.signs import signs

        require_place("--html", html)
        with busy(err, quiet, "Reading"):
            paths = [path for path in (run, other) if path is not None]
            runs = [read_run(path) for path in paths]
            page = render(runs, [read_samples(path) for path in paths])
        with whole_file(html) as stream:
            stream.write(page.encode())
        found = [(one.name, sign) for one in runs for sign in signs(one)]
        if not quiet:
            for name, sign in found:
                say(err, f"{name}, {sign.metric}: {sign.says}", "yellow")
            say(err, f"wrote {html}; {len(found)} sign{'s' * (len(found) != 1)} of trouble")
    raise typer.Exit(1 if found else 0)
