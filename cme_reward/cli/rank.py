"""The command line: `cme-reward rank`."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cme_reward.cli import flags
from cme_reward.cli.terminal import (
    busy,
    clean_errors,
    open_input,
    progress,
    require_place,
    say,
    stderr,
)
from cme_reward.errors import InputError

_data = partial(typer.Option, rich_help_panel="Data")
_output = partial(typer.Option, rich_help_panel="Output")


def rank(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.jsonl", help="The responses, also .jsonl.gz; - is standard input."
        ),
    ],
    verifiers: Annotated[
        list[str] | None,
        flags.models(
            "--verifier",
            metavar="SPEC",
            show_default="embedded",
            help="Who judges, as for score; repeat it to set several beside each other.",
        ),
    ] = None,
    generator_tokenizer: Annotated[
        str | None,
        flags.models(
            metavar="NAME_OR_PATH",
            show_default="the policy's, or the verifier's own",
            help="Tokenizer of the model that wrote the responses. Needed for response_ids.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        flags.models(
            metavar="NAME_OR_PATH",
            help="The model that wrote the responses, for rewards made of what it says of them, "
            "and for baseline=policy. Its log-probs are at temperature 1.",
        ),
    ] = None,
    padded_vocabulary: flags.PaddedVocabulary = False,
    device: flags.Device = None,
    verifier_options: flags.VerifierOptions = None,
    label: Annotated[
        str | None,
        _data(
            metavar="FIELD",
            help="The field that tells good from bad: true or false, or a number, higher being "
            "better; outer.inner for one inside another. Lines with chosen and rejected need none.",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        _data(
            metavar="FIELD=VALUE",
            help="Only lines in which it is so, such as meta.is_reference=false; may be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None, _data(metavar="N", min=1, help="Only the first N prompts.")
    ] = None,
    append_eos: Annotated[
        bool,
        flags.reward(
            "--append-eos",
            help="Score the end of responses, too, where they are given as text.",
        ),
    ] = False,
    settings: flags.Settings = None,
    config: flags.ConfigFile = None,
    also: Annotated[
        list[str] | None,
        flags.reward(
            metavar="'KEY=VALUE ...'",
            help="Further settings to rank by, beside those of --set: eos=mask, or "
            "'system_prompt=\"Be brief.\" eos=mask'. May be repeated; a text is read once for all "
            "settings that show the verifier the same.",
        ),
    ] = None,
    rewards: Annotated[
        list[str] | None,
        flags.reward(
            "--reward",
            metavar="'NAME [KEY=VALUE ...]'",
            help="Another reward to rank by, too: rent, em-rl-token, em-rl-sequence, intuitor, "
            "ttrl, evol-rl, rlme, self, random, or 'format-length longest=512'. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _output(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Write the lines again, with `scores` and `rank` (1: the best of its prompt by "
            "the first score).",
        ),
    ] = None,
    best: Annotated[
        bool, _output("--best", help="Only the best response of each prompt, in --output.")
    ] = False,
    html: Annotated[
        Path | None,
        _output(
            metavar="FILE.html",
            help="Also write a page: the tables, risk against coverage, and heat maps of the pairs "
            "that are most wrong.",
        ),
    ] = None,
    as_json: Annotated[
        bool, _output("--json", help="Print one JSON object in place of the tables.")
    ] = False,
    batch_size: Annotated[int, _output(metavar="N", min=1, help="Rows scored at a time.")] = 64,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Is this verifier good enough? Ranks responses, and tells how often rightly.

    **Input**: as for score, several responses to a prompt. With `--label`, or with lines of
    `prompt`, `chosen` and `rejected` (TRL's format, texts or messages), the better of two
    responses to one prompt should have the higher score: how often it has, with a 95 % interval by
    bootstrap over prompts, at equal length, and beside what choosing the shorter one does.
    Without labels: whether verifiers agree, and what the score goes with (length, repetition,
    boilerplate).

    Scores of a verifier's log-probs: their mean (Eq. 3, the reward), their sum, and the mean of
    the three lowest. `--reward` adds rivals. Intervals are not corrected for the number of scores
    looked at: decide on the first, and take the others for leads.

    **Exit status**: 0 every line was scored, 1 some were bad, 2 error, 3 all were scored, and the
    worse responses have the higher scores (STOP), 130 interrupted.

    **Example**: `cme-reward rank rollouts.jsonl --label is_correct --verifier
    hf:google/gemma-3-1b-it --also eos=mask --html rank.html`
    """
    err = stderr()
    with clean_errors(err), ExitStack() as stack:
        from cme_reward.cli import jsonl
        from cme_reward.cli.fields import among, require_fields, require_label
        from cme_reward.cli.options import configuration, make_scorer
        from cme_reward.cli.rank_output import as_dict, show, views, write_rows
        from cme_reward.cli.rank_rewards import Asked, Policy, controls, require_policy, rivals
        from cme_reward.cli.rank_rows import Response, preferences, responses
        from cme_reward.cli.rank_scores import Reading, finish, rank_batch
        from cme_reward.ranking.ranked import MEAN
        from cme_reward.ranking.report import report

        require_place("--html", html)
        require_place("--output", output)
        settled = {
            text: configuration(config, [*(settings or []), *shlex.split(text)])
            for text in ("", *(also or []))
        }
        if generator_tokenizer is None:
            generator_tokenizer = policy
        asked = [Asked.read(text) for text in rewards or []]
        based = any(one.baseline == "policy" for one in settled.values())
        require_policy(policy, asked)
        specs = {_short(spec, verifiers or []): spec for spec in verifiers or ["embedded"]}
        others = controls(asked, next(iter(specs.values())), policy)
        source = stack.enter_context(open_input(file, err))
        require_fields(source, label, where or [], limit)
        scorers, readings = {}, []
        for name, spec in [*specs.items(), *others]:
            with busy(err, quiet, f"Loading {spec}"):
                scorer = make_scorer(
                    spec,
                    generator_tokenizer,
                    device,
                    settled[""],
                    verifier_options or [],
                    padded_vocabulary=padded_vocabulary,
                )
                under = settled if name in specs else {"": settled[""]}
                readings.append(Reading.of(name, scorer, under))
            stack.callback(scorer.close)
            scorers[name] = scorer
        first = next(iter(scorers.values()))
        needed = based or any(one.needs_statistics for one in asked)
        with busy(err, quiet, f"Loading {policy if needed else 'other rewards'}"):
            control = scorers.get("self")
            itself = None if control is None else control.verifier
            writer = Policy(policy, device, itself) if policy and needed else None
            beside = rivals(asked, {name: scorers[name] for name in specs})
        rows = responses(
            jsonl.read_rows(
                source,
                None if generator_tokenizer is None else first.generator.id_limit,
                needs_policy=based and not policy,
                split=preferences,
            ),
            label,
            where or [],
            limit,
        )
        counts: Counter[str] = Counter()
        ranked, kept, tokens, started = [], [], 0, time.perf_counter()
        with progress(err, quiet, source) as advance:
            for batch in jsonl.batches(rows, batch_size):
                bad = [one for one in batch if isinstance(one, jsonl.Bad)]
                good = [one for one in batch if isinstance(one, Response)]
                scored = rank_batch(
                    readings, good, counts, end=append_eos, rivals=beside, policy=writer
                )
                for response, one in zip(good, scored, strict=True):
                    if isinstance(one, jsonl.Bad):
                        bad.append(one)
                        continue
                    ranked.append(one)
                    kept.append(response)
                    tokens += one.tokens
                counts["bad"] += len(bad)
                for one in sorted(bad, key=lambda one: one.line):
                    say(err, f"line {one.line}: {one.reason}", "red")
                advance(len(batch), tokens / (time.perf_counter() - started))
        if counts["truncated"]:
            say(err, f"{counts['truncated']:,} readings were cut off at a verifier's context "
                "length: what differs behind it is not seen", "yellow")  # fmt: skip
        if not ranked:
            raise InputError(f"{file} holds no response that could be scored; nothing to rank")
        require_label(kept, label, among(where or [], limit))
        with busy(err, quiet, "Drawing intervals"):
            finish(ranked, kept, beside, end=append_eos)
            found = report(ranked, [f"{name}: {MEAN}" for name in specs])
        if output is not None:
            write_rows(output, found, kept, best=best)
        if html is not None:
            from cme_reward.ranking.page import render

            page = render(
                found,
                views(found, kept, first, end=append_eos),
                title=f"How {readings[0].name} ranks {Path(file).name}",
                verifier=readings[0].name,
                generator=generator_tokenizer or f"{readings[0].name} (tokenizer)",
            )
            with jsonl.whole_file(html) as stream:
                stream.write(page.encode())
        if as_json:
            typer.echo(json.dumps(as_dict(found), ensure_ascii=False, indent=2))
        else:
            from rich.console import Console

            show(found, Console(highlight=False))
        for path in (output, html):
            if path is not None and not quiet:
                say(err, f"wrote {path}")
    raise typer.Exit(1 if counts["bad"] else 3 if found.prefers_worse else 0)


def _short(spec: str, others: list[str]) -> str:
    """A verifier's name without the folders, where that is clear."""

    def last(spec: str) -> str:
        kind, _, name = spec.partition(":")
        return f"{kind}:{Path(name).name}" if "/" in name and "+" not in spec else spec

    return last(spec) if [last(one) for one in others].count(last(spec)) == 1 else spec
