"""The report of the runs at hand: Markdown, one HTML page, pictures and all numbers as JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.miniature import decide, pictures, summary
from benchmarks.miniature.conditions import STUDY
from benchmarks.miniature.runs import World

COLUMNS = (
    ("accuracy", "accuracy"),
    ("win_base", "win rate, base"),
    ("win_reference", "win rate, reference"),
    ("sampled", "sampled accuracy"),
    ("length", "length"),
    ("stopped", "stopped"),
    ("repetition", "repetition"),
    ("entropy", "entropy"),
    ("distinct", "distinct"),
)
PAPER = (
    "The paper (abstract of arXiv 2605.29009) reports tie-adjusted win rates against the untrained "
    "base of 52.5 to 71.4 % over four model families and three training regimes, with a language "
    "model as the judge. Here a program judges, of one small family, so sizes of effects are not "
    "comparable; their order is."
)
TITLES = {
    "rewards": "Rewards (beside the paper's Tables 1 and 2)",
    "verifiers": "Verifiers (beside the paper's Figure 3)",
    "regimes": "Training regimes of the generator (beside the paper's Table 1)",
    "lessons": "More training: eps, EOS and returns-to-go",
    "horizon": "Ten times the updates: what a token is credited with",
    "screen": "Twice the updates: candidates",
    "claims": "Twice the updates: the paper's settings",
    "harder": "Long answers, a middling verifier",
}
DECIDED = (
    "Ours minus theirs, paired by seed, with half of an interval that is corrected for all the "
    "comparisons of this table: {} at the end, its mean over the run, and the drop from a "
    "run's best. The verdict is about that at the end."
)
Table = tuple[Sequence[str], list[list[str]]]


def write(world: World) -> Path:
    """Write report.json, report.md, report.html and pictures/; returns the page."""
    found = summary.summary(world)
    summary.write(world, found)
    files = pictures.draw_all(found, world.folder / "pictures")
    parts = sections(found)
    (world.folder / "report.md").write_text(_markdown(parts, files))
    page = world.folder / "report.html"
    page.write_text(_html(parts, files))
    return page


def sections(found: dict[str, Any]) -> list[tuple[str, str, Table]]:
    """Heading, text and table of each part."""
    claims: Table = (
        ("claim", "here", "numbers"),
        [[c["text"], c["verdict"], c["numbers"]] for c in found["claims"]],
    )
    cast: Table = (
        ("model", "accuracy"),
        [[name, f"{accuracy:.2f}"] for name, accuracy in found["cast"].items()],
    )
    parts = [
        (
            "Claims",
            f"{PAPER} Intervals are 95 % over seeds (Student's t; differences paired by seed), "
            f"each of {found['questions']} held-out questions. A verdict needs an interval on one "
            "side; claims about means say so.",
            claims,
        ),
        ("Models before training", "Greedy accuracy on held-out questions.", cast),
    ]
    if found["ranking"]:
        ranked: Table = (
            ("reward", "right above mistake"),
            [[name, f"{share:.2f}"] for name, share in found["ranking"].items()],
        )
        text = (
            "Share of held-out questions at which a reward is higher for the right answer than for "
            "the generator's mistake, before any training. 0.5 is chance."
        )
        parts.append(("What the rewards prefer", text, ranked))
    rows = found["rows"]
    for group, names in found["groups"].items():
        drifts = group == "lessons" or group in STUDY
        bases = [] if drifts else [n for n in summary.BASES.values() if n in rows]
        chosen = [n for n in bases if group == "regimes" or n == "base"] + names
        if group == "harder" and names:
            chosen = [summary.LONG_BASE, *names]
        if names:
            table = [
                [n, str(len(rows[n]["seeds"])), *(_cell(rows[n], key) for key, _ in COLUMNS)]
                for n in chosen
            ]
            header = ("condition", "seeds", *(label for _, label in COLUMNS))
            text = "Mean ± half the 95 % interval."
            if drifts:
                header, table = (
                    (*header, "best"),
                    [[*row, _cell(rows[n], "best")] for row, n in zip(table, chosen, strict=True)],
                )
                text += " `best` is the highest accuracy at any measurement: the drop is the drift."
            parts.append((TITLES[group], text, (header, table)))
        if decisions := found["decisions"].get(group):
            parts.append((f"{TITLES[group]}: decided", _deciding(group), _decided(decisions)))
    keys = summary.PARTS
    by_task = [
        [name, *(f"{row['tasks'][k]:.2f}" if k in row["tasks"] else "" for k in keys)]
        for name, row in rows.items()
    ]
    parts.append(
        ("Accuracy by task, and by length of the letters", "", (("condition", *keys), by_task))
    )
    said = [
        [name, prompt.strip(), response]
        for name, pairs in found["examples"].items()
        for prompt, response in pairs
        if prompt.startswith(("reverse", "say", "tell"))
    ]
    parts.append(("What they say (seed 0)", "", (("condition", "prompt", "response"), said)))
    return parts


def _deciding(group: str) -> str:
    greedy = decide.MEASURES.get(group, "accuracy") == "accuracy"
    return DECIDED.format("accuracy" if greedy else "accuracy of sampled answers")


def _decided(decisions: list[dict[str, Any]]) -> Table:
    header = ("ours", "theirs", "seeds", "accuracy at the end", "area", "drift", "verdict")
    rows = [
        [
            d["ours"],
            d["theirs"],
            str(d["seeds"]),
            *(summary.signed(*d[key]) for key in ("end", "area", "drift")),
            d["verdict"],
        ]
        for d in decisions
    ]
    return header, rows


def _cell(row: dict[str, Any], key: str) -> str:
    mean, half = row[key]
    if mean != mean:
        return ""
    digits = 1 if key == "length" else 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")


def _markdown(parts: list[tuple[str, str, Table]], files: list[Path]) -> str:
    lines = ["# The paper in miniature", ""]
    for heading, text, (header, rows) in parts:
        lines += [f"## {heading}", "", text, ""] if text else [f"## {heading}", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        lines.append("")
    lines += [f"![{file.stem}](pictures/{file.name})\n" for file in files]
    return "\n".join(lines)


def _html(parts: list[tuple[str, str, Table]], files: list[Path]) -> str:
    body = ["<h1>The paper in miniature</h1>"]
    for file in files:
        data = base64.b64encode(file.read_bytes()).decode()
        body.append(f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{data}">')
    for heading, text, (header, rows) in parts:
        body.append(f"<h2>{escape(heading)}</h2><p>{escape(text)}</p><div><table><tr>")
        body += [f"<th>{escape(cell)}" for cell in header]
        for row in rows:
            body.append("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row))
        body.append("</table></div>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
        "color:#1f2430;background:#fff}table{border-collapse:collapse;font-size:13px}"
        "div{overflow-x:auto}td,th{padding:.2rem .6rem;border-bottom:1px solid #d8dce4;"
        "text-align:left;vertical-align:top}img{max-width:100%;display:block;margin:1rem 0}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>The paper in miniature'
        f"</title><style>{style}</style>{''.join(body)}</html>"
    )
