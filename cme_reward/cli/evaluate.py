"""The command line: `cme-reward evaluate`."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cme_reward.cli.terminal import busy, clean_errors, open_input, say, stderr
from cme_reward.errors import ConfigError

_judge = partial(typer.Option, rich_help_panel="Judge")
_data = partial(typer.Option, rich_help_panel="Data")
_output = partial(typer.Option, rich_help_panel="Output")


def evaluate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE.jsonl", help="The responses, also .jsonl.gz; - is standard input."
        ),
    ],
    judge_specs: Annotated[
        list[str] | None,
        _judge(
            "--judge",
            metavar="SPEC",
            help="Who judges. `http://host/v1`: a server with OpenAI's chat completions. "
            "`python:module:function`: called with prompt, first and second response, from "
            "several threads. Repeat it for several judges.",
        ),
    ] = None,
    judge_models: Annotated[
        list[str] | None,
        _judge(
            "--judge-model",
            metavar="NAME",
            help="The model of a judge behind HTTP: one for all, or one for each.",
        ),
    ] = None,
    key_names: Annotated[
        list[str] | None,
        _judge(
            "--api-key-env",
            metavar="NAME",
            show_default="OPENAI_API_KEY, if there is one",
            help="The environment variable with its key, likewise.",
        ),
    ] = None,
    both_orders: Annotated[
        bool,
        _judge(
            "--both-orders",
            help="Ask about each pair in both orders; different verdicts are a tie.",
        ),
    ] = False,
    logprobs: Annotated[
        bool,
        _judge(
            "--judge-logprobs",
            help="Ask the server for the log-probs of the verdict, and count its chances of A, B "
            "and TIE in place of the verdict alone.",
        ),
    ] = False,
    concurrency: Annotated[
        int, _judge(metavar="N", min=1, max=1024, help="Most questions at a time.")
    ] = 8,
    timeout: Annotated[
        float, _judge(metavar="SECONDS", min=0.001, help="For one attempt, over HTTP.")
    ] = 120.0,
    retries: Annotated[
        int,
        _judge(
            metavar="N", min=0, help="Further attempts after a time-out, 429 or 5xx, over HTTP."
        ),
    ] = 5,
    price_in: Annotated[
        list[float] | None,
        _judge(
            metavar="USD",
            min=0,
            help="Of a million tokens shown to a judge: one price for all, or one for each.",
        ),
    ] = None,
    price_out: Annotated[
        list[float] | None,
        _judge(metavar="USD", min=0, help="Of a million tokens that a judge writes, likewise."),
    ] = None,
    against: Annotated[
        str | None,
        _data(
            metavar="MODEL",
            show_default="the first one seen",
            help="The baseline, with which every other model is compared.",
        ),
    ] = None,
    preferences: Annotated[
        str | None,
        _data(
            metavar="FIELD",
            help='Ask no judge: the field holds {"vs": MODEL, "p_win": 0.8}; outer.inner for one '
            "inside another. Lines of AlpacaEval's annotations (output_1, generator_1, ..., "
            "preference) are read as well.",
        ),
    ] = None,
    seed: Annotated[
        int, _data(metavar="N", help="Draws which response is shown first, and the intervals.")
    ] = 0,
    abstain_above: Annotated[
        float | None,
        _data(
            metavar="NATS",
            min=0,
            help="Leave out pairs about which a judge is more uncertain: the entropy of its "
            "preference over both orders, 0.693 where they contradict.",
        ),
    ] = None,
    abstain_risk: Annotated[
        float | None,
        _data(
            metavar="SHARE",
            help="Find that limit from labelled pairs, so that at most this share of the verdicts "
            "kept is wrong, at 95 % confidence. Needs --label.",
        ),
    ] = None,
    label: Annotated[
        str | None,
        _data(
            metavar="FIELD",
            help="The field that tells the better response of some pairs: true or false, or a "
            'number, as for rank; or {"vs": MODEL, "p_win": 1}.',
        ),
    ] = None,
    out: Annotated[
        Path,
        _output(
            "--out",
            "-o",
            metavar="DIR",
            help="Where judgments.jsonl, report.json and report.html go. What is judged there "
            "already is not asked again.",
        ),
    ] = Path("evaluation"),
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Which model answers better? Pairs of responses put before a judge.

    **Input**: a JSON object on each line, with `prompt` (a text, or messages), `response` and
    `model`; without `model`, the file's name is it. Prompts are matched by their exact content.

    The judge sees the prompt and both responses, in an order drawn by the seed, and ends with
    `VERDICT: A`, `VERDICT: B` or `VERDICT: TIE`. A reply without is **unreadable**, a question
    without a reply **failed**: neither is a tie, and neither counts.

    **Output**: of each model, its win rate (ties half) with a 95 % interval by bootstrap over
    prompts, the win rate at equal length, and what was and was not counted. Every judgment is on
    the disk the moment it comes; the same command goes on where it was stopped, and asks again
    only what failed.

    **Exit status**: 0 every pair was judged, 1 some were not or lines were bad, 2 error, 130
    interrupted.

    **Example**: `cme-reward evaluate base.jsonl tuned.jsonl --judge https://api.openai.com/v1
    --judge-model gpt-4.1-mini --both-orders --out evaluation`
    """
    err = stderr()
    with clean_errors(err), ExitStack() as stack:
        from cme_reward.cli.evaluate_judges import Prices, load_judges
        from cme_reward.cli.evaluate_output import Found, show, write
        from cme_reward.cli.evaluate_rows import Answers
        from cme_reward.cli.evaluate_run import better_sides, calibrated, judged, stored
        from cme_reward.evaluation.judge import FAILED, UNREADABLE
        from cme_reward.evaluation.pairs import pairs_of
        from cme_reward.evaluation.results import abstaining

        specs = judge_specs or []
        if bool(specs) == (preferences is not None):
            raise ConfigError(
                "expected either --judge SPEC (http://host/v1 or python:module:function) or "
                "--preferences FIELD"
            )
        if abstain_above is not None and abstain_risk is not None:
            raise ConfigError("--abstain-above and --abstain-risk are two ways to one limit")
        if (abstain_risk is None) != (label is None):
            raise ConfigError("--abstain-risk SHARE and --label FIELD need each other")
        if abstain_risk is not None and not 0 < abstain_risk < 1:
            raise ConfigError(f"--abstain-risk {abstain_risk:g}; expected a share, such as 0.1")
        limited = abstain_above is not None or abstain_risk is not None
        if limited and specs and not both_orders and not logprobs:
            name = "--abstain-above" if abstain_risk is None else "--abstain-risk"
            raise ConfigError(
                f"{name} needs --both-orders or --judge-logprobs: one verdict has no entropy"
            )
        answers = Answers()
        for file in files:
            with open_input(file, err) as source, busy(err, quiet, f"Reading {file}"):
                answers.read(file, source, preferences, label)
        for reason in answers.bad:
            say(err, reason, "red")
        answers.require("--preferences", preferences)
        answers.require("--label", label)
        pairs = pairs_of(answers.kept, against)
        sides = better_sides(answers.labels, pairs, label) if label is not None else {}
        judges = load_judges(
            specs,
            judge_models or [],
            key_names or [],
            timeout=timeout,
            retries=retries,
            concurrency=concurrency,
            logprobs=logprobs,
        )
        for one in judges:
            stack.callback(getattr(one, "close", lambda: None))
        if preferences is not None:
            outcomes, cost = stored(answers.stored, pairs, preferences), None
        else:
            outcomes, cost = judged(
                judges,
                pairs,
                out,
                seed=seed,
                both_orders=both_orders,
                prices=Prices.read(judges, price_in or [], price_out or []),
                concurrency=concurrency,
                quiet=quiet,
                err=err,
            )
        calibrations = calibrated(outcomes, sides, abstain_risk, seed) if abstain_risk else []
        limits = {one.judge: one.threshold for one in calibrations}
        outcomes = [abstaining(one, limits.get(one.judge, abstain_above)) for one in outcomes]
        settings = {
            "files": files,
            "against": pairs[0].baseline,
            "judges": [one.name for one in judges],
            "preferences": preferences,
            "both_orders": both_orders,
            "judge_logprobs": logprobs,
            "abstain_above": abstain_above,
            "abstain_risk": abstain_risk,
            "label": label,
            "seed": seed,
        }
        with busy(err, quiet, "Drawing intervals"):
            found = Found.of(outcomes, cost, seed, calibrations)
        write(out, found, settings)
        from rich.console import Console

        show(found, Console(highlight=False))
        if not quiet:
            say(err, f"wrote {out / 'report.json'} and {out / 'report.html'}")
        missing = Counter(one.says for one in outcomes)
        for name, remedy in (
            (UNREADABLE, "their replies are in the journal; --judge-model names another model"),
            (FAILED, "the same command asks again"),
        ):
            if missing[name]:
                say(err, f"{missing[name]:,} {name}, not counted: {remedy}", "yellow")
        if missing[FAILED]:
            replies = (j["reply"] for one in outcomes for j in one.judgments
                       if j["verdict"] == FAILED)  # fmt: skip
            said = " ".join(next(replies, "").split())
            say(err, f"the first failed with: {said[:300]}", "yellow")
    raise typer.Exit(1 if answers.bad or missing[UNREADABLE] or missing[FAILED] else 0)
