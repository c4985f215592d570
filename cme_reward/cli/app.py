"""The command line: `cme-reward score`, `rank`, `evaluate`, `report`, `check-pair` and `serve`.

Help has to come at once, so that everything else is imported by the command that needs it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cme_reward.cli import flags
from cme_reward.cli.evaluate import evaluate
from cme_reward.cli.rank import rank
from cme_reward.cli.report import report
from cme_reward.cli.serve import serve
from cme_reward.cli.terminal import (
    busy,
    clean_errors,
    open_input,
    open_output,
    progress,
    require_place,
    say,
    stderr,
)

if TYPE_CHECKING:
    from cme_reward.heatmap.render import ResponseView

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main = app  # the entry point of the package
_output = partial(typer.Option, rich_help_panel="Output")


def _version(asked: bool) -> None:
    if asked:
        from cme_reward import __version__

        typer.echo(f"cme-reward {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Score the responses of one language model by how well another one expects them.

    The reward of a token is its log-probability, in nats, under a frozen **verifier**
    model: 0 is certain, and the lower it is, the more the token surprises the verifier. The two
    models may have different tokenizers.

    Try `cme-reward check-pair GENERATOR VERIFIER` to see whether two tokenizers fit
    together, `cme-reward rank FILE.jsonl` to see whether a verifier is good enough, `cme-reward
    score FILE.jsonl` to score responses, and `cme-reward serve` to serve rewards to a trainer.
    """


@app.command(no_args_is_help=True)
def score(
    file: Annotated[
        str, typer.Argument(metavar="FILE.jsonl", help="The rows to score; - is standard input.")
    ],
    verifier: Annotated[
        str,
        flags.models(
            metavar="SPEC",
            help="Who judges. `embedded`: a small model that comes with this package, "
            "for trying things out. `hf:NAME_OR_PATH`: a causal language model of "
            "transformers. `random:NAME_OR_PATH`: the same, untrained. `vllm:URL[,URL]`, "
            "`sglang:URL[,URL]`: one that servers run. `python:MODULE:NAME`: your own. Several are "
            "joined by +.",
        ),
    ] = "embedded",
    generator_tokenizer: Annotated[
        str | None,
        flags.models(
            metavar="NAME_OR_PATH",
            show_default="the verifier's own",
            help="Tokenizer of the model that wrote the responses: its tokens get the rewards. "
            "Needed for response_ids.",
        ),
    ] = None,
    padded_vocabulary: flags.PaddedVocabulary = False,
    device: flags.Device = None,
    verifier_options: flags.VerifierOptions = None,
    append_eos: Annotated[
        bool,
        flags.reward(
            "--append-eos",
            help="Score the end of responses, too, where they are given as text: their writers "
            "stopped there by themselves. (A text has no token for that, response_ids do.)",
        ),
    ] = False,
    settings: flags.Settings = None,
    config: flags.ConfigFile = None,
    output: Annotated[
        str,
        _output(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Where the scored rows go; - is standard output.",
        ),
    ] = "-",
    html: Annotated[
        Path | None,
        _output(
            metavar="FILE.html",
            help="Also write a heat map of the responses, to open in a browser.",
        ),
    ] = None,
    html_limit: Annotated[
        int, _output(metavar="N", min=1, help="Most responses in the heat map: the first N.")
    ] = 200,
    show: Annotated[
        int,
        _output(
            metavar="N",
            min=0,
            help="Show the first N responses in the terminal, shaded by surprise.",
        ),
    ] = 0,
    batch_size: Annotated[
        int,
        _output(
            metavar="N", min=1, help="Rows scored and written at a time; no others are in memory."
        ),
    ] = 256,
    quiet: Annotated[
        bool,
        _output("--quiet", "-q", help="No progress, no summary: only bad lines and errors."),
    ] = False,
) -> None:
    """Score the responses in a JSON Lines file, token by token.

    **Input**: a JSON object on each line, with

    - `prompt` (a text) or `messages` (a list of `{"role": "user", "content": "..."}`)
    - `response` (a text) or `response_ids` (the tokens that the generator sampled)
    - with response_ids, if there is need: `response_mask` (0 marks tokens that a tool or an
      environment wrote, and padding) and `policy_logprobs` (for `--set baseline=policy`)

    **Output**: the same rows in the same order, all their fields and, in nats,

    - `sequence_reward`: the mean log-probability of the verifier's tokens
    - `token_rewards`, `mask` (false: has no reward) and `tokens` (texts): one entry for each of
      the generator's tokens
    - `dropped_nats`: surprise that lies on tokens without a reward

    Numbers have six decimals. Input fields of these five names are replaced. Bad lines
    are reported with their number and left out; all others are scored. A file has its name with
    `.partial` after it until it is complete.

    **Exit status**: 0 every line was scored, 1 some were bad, 2 error (a model is missing, ...),
    130 interrupted.

    **Example**: `cme-reward score rollouts.jsonl --verifier hf:google/gemma-3-1b-it
    --generator-tokenizer Qwen/Qwen2.5-0.5B-Instruct --output scored.jsonl --html report.html`
    """
    err = stderr()
    with clean_errors(err, output), ExitStack() as stack:
        from cme_reward.cli.options import configuration, make_scorer

        settled = configuration(config, settings or [])
        require_place("--html", html)
        source = stack.enter_context(open_input(file, err))
        sink = stack.enter_context(open_output(output, html is not None or show > 0, err))
        with busy(err, quiet, f"Loading {verifier}"):
            scorer = make_scorer(
                verifier,
                generator_tokenizer,
                device,
                settled,
                verifier_options or [],
                padded_vocabulary=padded_vocabulary,
            )
        from cme_reward.cli import jsonl
        from cme_reward.cli.score import as_view, dump, score_rows, summary, write_html

        vocab_size = None if generator_tokenizer is None else scorer.generator.id_limit
        rows = jsonl.read_rows(source, vocab_size, needs_policy=settled.baseline == "policy")
        eos_id = scorer.generator.end_of_turn if append_eos else None
        counts: Counter[str] = Counter()
        views: list[ResponseView] = []
        reward_sum, started = 0.0, time.perf_counter()
        with progress(err, quiet, source) as advance:
            for batch in jsonl.batches(rows, batch_size):
                bad = [row for row in batch if isinstance(row, jsonl.Bad)]
                good = [row for row in batch if isinstance(row, jsonl.Row)]
                for scored in score_rows(scorer, good, counts, eos_id):
                    if isinstance(scored, jsonl.Bad):
                        bad.append(scored)
                        continue
                    sink.write(dump(scored))
                    counts["scored"] += 1
                    counts["tokens"] += len(scored.mask)
                    counts["rewarded"] += sum(scored.mask)
                    reward_sum += scored.sequence_reward
                    if len(views) < max(show, html_limit if html else 0):
                        views.append(as_view(scored, scorer))
                sink.flush()
                counts["bad"] += len(bad)
                for row in sorted(bad, key=lambda row: row.line):
                    say(err, f"line {row.line}: {row.reason}", "red")
                advance(len(batch), counts["tokens"] / (time.perf_counter() - started))
        seconds = time.perf_counter() - started
        stack.close()  # the output takes its name
        if html is not None:
            write_html(html, views[:html_limit], file, verifier, generator_tokenizer)
        if show:
            from cme_reward.heatmap.render import print_heat_map

            for view in views[:show]:
                print_heat_map(view, err)
        if not quiet:
            if html is not None and counts["scored"] > html_limit:
                say(err, f"{html} holds the first {html_limit} responses; see --html-limit")
            say(err, summary(counts, reward_sum, seconds), "bold")
            for path in [output] * (output != "-") + [html] * (html is not None):
                say(err, f"wrote {path}")
    raise typer.Exit(1 if counts["bad"] else 0)


@app.command("check-pair", no_args_is_help=True)
def check_pair(
    generator: Annotated[
        str, typer.Argument(metavar="GENERATOR", help="Tokenizer of the model to be trained.")
    ],
    verifier: Annotated[
        str, typer.Argument(metavar="VERIFIER", help="Tokenizer of the model that judges.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of the tables.")
    ] = False,
) -> None:
    """Do two tokenizers fit together? Tries them on texts in many languages.

    Both are given as `NAME_OR_PATH` on the hub or on disk, or as for score --verifier:
    `embedded`, `hf:NAME_OR_PATH`. Only the tokenizers are loaded, no model.

    Shows for each text how many tokens it is to either side, whether every verifier token has its
    exact place in the generator's tokens, how many of those would get a reward, and how much of
    the text's log-probability would be dropped; and then the chat templates and special tokens,
    and whether the two tokenizers are of the same family.

    **Exit status.** 0: all texts are aligned exactly. 1: some are not, or a tokenizer loses text.
    2: error.

    Example: `cme-reward check-pair Qwen/Qwen2.5-0.5B-Instruct google/gemma-3-1b-it`
    """
    err = stderr()
    with clean_errors(err):
        from cme_reward.loading import load_tokenizer, silence

        with busy(err, as_json, "Loading tokenizers"):
            silence()
            tokenizers = [load_tokenizer(name) for name in (generator, verifier)]
        from cme_reward.cli.check_pair import check

        with busy(err, as_json, "Aligning samples"):
            found = check(*tokenizers, names=(generator, verifier))
        if as_json:
            typer.echo(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
        else:
            from rich.console import Console

            from cme_reward.cli.pair_screen import show

            show(found, Console(highlight=False))
    raise typer.Exit(0 if found.exact else 1)


app.command(no_args_is_help=True)(rank)
app.command(no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(report)
app.command(no_args_is_help=True)(serve)
