"""The screen of `cme-reward check-pair`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cme_reward.cli.check_pair import PairCheck


def show(found: PairCheck, console: Console) -> None:
    """Print all of it, for a terminal of 80 columns or more."""
    from rich.table import Table
    from rich.text import Text

    sides = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "generator", "verifier"):
        sides.add_column(heading, overflow="fold")
    for what in _SIDE_ROWS:
        values = [getattr(side, what) for side in (found.generator, found.verifier)]
        sides.add_row(_SIDE_ROWS[what], *(Text(_shown(value)) for value in values))
    console.print(sides)

    if found.samples:
        _show_samples(found, console)
    for warning in found.warnings():
        console.print(Text(f"\nNote: {warning}", style="yellow"))
    console.print()
    console.print(Text(found.verdict(), style="bold green" if found.exact else "bold red"))


def _show_samples(found: PairCheck, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    samples = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    samples.add_column("\ntext", no_wrap=True)
    for heading in ("generator\ntokens", "verifier\ntokens", "aligned\nexactly"):
        samples.add_column(heading, justify="right")
    for heading in ("tokens with\na reward", "log-prob\ndropped"):
        samples.add_column(heading, justify="right")
    samples.add_column("\nremarks")
    for sample in found.samples:
        samples.add_row(
            sample.name,
            str(sample.generator_tokens),
            str(sample.verifier_tokens),
            "yes" if sample.exact else Text("no", style="bold red"),
            f"{sample.rewarded:.0%}",
            f"{sample.dropped:.0%}",
            Text("; ".join(sample.notes)),
        )
    console.print()
    console.print(samples)
    legend = (
        "Special tokens, and parts of a character that is cut off, have no reward. "
        "Dropped is the share of the log-probability on them, if all verifier tokens were equally "
        "likely."
    )
    if not found.exact:
        legend += (
            " Not aligned exactly: the verifier reads another text than was written (see remarks), "
            "and its log-probabilities go to the stretch of text they come from."
        )
    console.print(Text(f"\n{legend}", style="dim"))


_SIDE_ROWS = {
    "name": "",
    "kind": "kind",
    "vocabulary": "vocabulary",
    "bos": "begin of text (BOS)",
    "eos": "end of text (EOS)",
    "end_of_turn": "end of turn",
    "chat_template": "chat template",
    "generation_prompt": "starts a response with",
    "system_role": "system role",
}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value.replace("\n", "\\n") if value else "-"
