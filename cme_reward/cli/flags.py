"""Options that several commands have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

models = partial(typer.Option, rich_help_panel="Models")
reward = partial(typer.Option, rich_help_panel="Reward")

PaddedVocabulary = Annotated[
    bool,
    models(
        "--padded-vocabulary",
        help="The sampling model has more ids than its tokenizer (Qwen2.5: 151,936 of 151,665). "
        "Those write nothing and have no reward; otherwise they are errors.",
    ),
]
Device = Annotated[
    str | None,
    models(
        metavar="NAME",
        show_default="a GPU if there is one",
        help="Where the verifier runs, such as cpu or cuda:1.",
    ),
]
VerifierOptions = Annotated[
    list[str] | None,
    models(
        "--verifier-option",
        metavar="KEY=VALUE",
        help="An option of load_verifier, such as dtype=bfloat16, or tokenizer=NAME_OR_PATH "
        "for a server; may be repeated.",
    ),
]
Settings = Annotated[
    list[str] | None,
    reward(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of CMEConfig, such as level=sequence, eos=mask or "
        "system_prompt='Be brief.'; may be repeated. An unknown key lists them all.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    reward(metavar="FILE.yaml", help="Settings from a file; --set has the last word."),
]
