"""The command line: `cme-reward score` and `cme-reward check-pair`.

Help has to come at once, so that everything else is imported by the command that needs it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from cme_reward.errors import CMEError, ConfigError, InputError, TokenizerError

if TYPE_CHECKING:
    from rich.console import Console

    from cme_reward.config import CMEConfig
    from cme_reward.jsonl import Scored
    from cme_reward.report import ResponseView
    from cme_reward.reward import CrossModelEntropy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main = app  # the entry point of the package
_models = partial(typer.Option, rich_help_panel="Models")
_reward = partial(typer.Option, rich_help_panel="Reward")
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
    together, and `cme-reward score FILE.jsonl` to score responses.
    """


@app.command(no_args_is_help=True)
def score(
    file: Annotated[
        str, typer.Argument(metavar="FILE.jsonl", help="The rows to score; - is standard input.")
    ],
    verifier: Annotated[
        str,
        _models(
            metavar="SPEC",
            help="Who judges. `embedded`: a small model that comes with this package, "
            "for trying things out. `hf:NAME_OR_PATH`: a causal language model of "
            "transformers. `random:NAME_OR_PATH`: the same, untrained. Several are "
            "joined by +.",
        ),
    ] = "embedded",
    generator_tokenizer: Annotated[
        str | None,
        _models(
            metavar="NAME_OR_PATH",
            show_default="the verifier's own",
            help="Tokenizer of the model that wrote the responses: its tokens get the rewards. "
            "Needed for response_ids.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        _models(
            metavar="NAME",
            show_default="a GPU if there is one",
            help="Where the verifier runs, such as cpu or cuda:1.",
        ),
    ] = None,
    append_eos: Annotated[
        bool,
        _reward(
            "--append-eos",
            help="Score the end of responses, too, where they are given as text: their writers "
            "stopped there by themselves. (A text has no token for that, response_ids do.)",
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        _reward(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of CMEConfig, such as whitespace=keep, eos=mask or "
            "system_prompt='Be brief.'; may be repeated. An unknown key lists them all.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _reward(metavar="FILE.yaml", help="Settings from a file; --set has the last word."),
    ] = None,
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
      environment wrote) and `policy_logprobs` (for `--set baseline=policy`)

    **Output**: the same rows in the same order, all their fields and, in nats,

    - `sequence_reward`: the mean log-probability of the verifier's tokens
    - `token_rewards`, `mask` (false: has no reward) and `tokens` (texts): one entry for each of
      the generator's tokens
    - `dropped_nats`: surprise that lies on tokens without a reward

    Numbers have six significant digits. Input fields of these five names are replaced. Bad lines
    are reported with their number and left out; all others are scored. A file has its name with
    `.partial` after it until it is complete.

    **Exit status**: 0 every line was scored, 1 some were bad, 2 error (a model is missing, ...),
    130 interrupted.

    **Example**: `cme-reward score rollouts.jsonl --verifier hf:google/gemma-3-1b-it
    --generator-tokenizer Qwen/Qwen2.5-0.5B-Instruct --output scored.jsonl --html report.html`
    """
    err = _stderr()
    with _clean_errors(err, output), ExitStack() as stack:
        configuration = _configuration(config, settings or [])
        if html is not None and not html.resolve().parent.is_dir():
            raise InputError(f"--html {html}: the directory {html.parent} does not exist")
        source = stack.enter_context(_open_input(file, err))
        sink = stack.enter_context(_open_output(output, html is not None or show > 0, err))
        with _busy(err, quiet, f"Loading {verifier}"):
            scorer = _scorer(verifier, generator_tokenizer, device, configuration)
        from cme_reward import jsonl

        vocab_size = None if generator_tokenizer is None else scorer.table.vocab_size
        rows = jsonl.read_rows(source, vocab_size, needs_policy=configuration.baseline == "policy")
        eos_id = _end_of_turn(scorer) if append_eos else None
        counts: Counter[str] = Counter()
        views: list[ResponseView] = []
        reward_sum, started = 0.0, time.perf_counter()
        with _progress(err, quiet, source) as advance:
            for batch in jsonl.batches(rows, batch_size):
                bad = [row for row in batch if isinstance(row, jsonl.Bad)]
                good = [row for row in batch if isinstance(row, jsonl.Row)]
                for scored in jsonl.score_rows(scorer, good, counts, eos_id):
                    if isinstance(scored, jsonl.Bad):
                        bad.append(scored)
                        continue
                    sink.write(jsonl.dump(scored))
                    counts["scored"] += 1
                    counts["tokens"] += len(scored.mask)
                    counts["rewarded"] += sum(scored.mask)
                    reward_sum += scored.sequence_reward
                    if len(views) < max(show, html_limit if html else 0):
                        views.append(_view(scored, scorer))
                sink.flush()
                counts["bad"] += len(bad)
                for row in sorted(bad, key=lambda row: row.line):
                    _say(err, f"line {row.line}: {row.reason}", "red")
                advance(len(batch), counts["tokens"] / (time.perf_counter() - started))
        seconds = time.perf_counter() - started
        stack.close()  # the output takes its name
        if html is not None:
            _write_html(html, views[:html_limit], file, verifier, generator_tokenizer)
        for view in views[:show]:
            from cme_reward.report import print_heat_map

            print_heat_map(view, err)
        if not quiet:
            if html is not None and counts["scored"] > html_limit:
                _say(err, f"{html} holds the first {html_limit} responses; see --html-limit")
            _say(err, _summary(counts, reward_sum, seconds), "bold")
            for path in [output] * (output != "-") + [html] * (html is not None):
                _say(err, f"wrote {path}")
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

    **Exit status.** 0: all texts are aligned exactly. 1: some are not. 2: error.

    Example: `cme-reward check-pair Qwen/Qwen2.5-0.5B-Instruct google/gemma-3-1b-it`
    """
    err = _stderr()
    with _clean_errors(err):
        with _busy(err, as_json, "Loading tokenizers"):
            _silence()
            tokenizers = [load_tokenizer(name) for name in (generator, verifier)]
        from cme_reward.check_pair import check, show

        with _busy(err, as_json, "Aligning samples"):
            found = check(*tokenizers, names=(generator, verifier))
        if as_json:
            typer.echo(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
        else:
            from rich.console import Console

            show(found, Console(highlight=False))
    raise typer.Exit(0 if found.exact else 1)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a name on the hub, a directory, or a verifier spec; no weights are loaded.

    Raises:
        TokenizerError: if there is none, or for a spec of several verifiers.
    """
    from transformers import AutoTokenizer

    import cme_reward.verifiers

    kind, _, rest = name.partition(":")
    where = rest if kind in ("hf", "random") and rest else name
    if name == "embedded" and not Path(name).exists():
        where = str(Path(cme_reward.verifiers.__file__).parent / "embedded")
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # of many kinds, for an unknown name, no network, a broken file
        first = str(error).strip().partition("\n")[0]
        raise TokenizerError(
            f"cannot load the tokenizer {name!r}: expected a directory with a tokenizer.json, the "
            "name of a model on the hub (check the spelling, the network and HF_TOKEN), or "
            f"embedded. transformers says: {first}"
        ) from error


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def _clean_errors(err: Console, output: str = "-") -> Iterator[None]:
    """Ends the program with a message, not a traceback, for errors that are the user's to solve."""
    try:
        yield
    except KeyboardInterrupt:
        _say(err, "interrupted", "red")
        status = 130  # what shells report for Ctrl-C
    except BrokenPipeError:
        # The reader has gone, as `head` does; closing standard output must not raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # what shells report for it
    except (CMEError, OSError) as error:
        _say(err, f"error: {error}", "red")
        status = 2
    else:
        return
    from cme_reward.jsonl import partial_path

    if output != "-" and partial_path(Path(output)).exists():
        _say(err, f"the rows scored so far are in {partial_path(Path(output))}")
    raise typer.Exit(status)


def _configuration(file: Path | None, settings: list[str]) -> CMEConfig:
    from dataclasses import asdict

    from cme_reward.config import CMEConfig

    values = asdict(CMEConfig() if file is None else CMEConfig.from_yaml(file))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r}: expected KEY=VALUE, such as eos=mask")
        values[key.strip()] = value
    return CMEConfig.from_dict(values)


def _silence() -> None:
    """Keep what transformers says about its own loading out of the way."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _scorer(
    verifier: str, generator_tokenizer: str | None, device: str | None, config: CMEConfig
) -> CrossModelEntropy:
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.verifiers import Ensemble, load_verifier

    _silence()
    # First: a wrong name is noticed before minutes of loading weights.
    tokenizer = load_tokenizer(generator_tokenizer) if generator_tokenizer else None
    model = load_verifier(verifier, **({} if device is None else {"device": device}))
    first = model.members[0] if isinstance(model, Ensemble) else model
    return CrossModelEntropy(model, tokenizer or first.tokenizer, config)


def _end_of_turn(scorer: CrossModelEntropy) -> int:
    """The id with which the generator ends a response."""
    from cme_reward.prompts import PromptFormat

    tokenizer = scorer.generator_tokenizer
    for end in (PromptFormat(tokenizer).end_of_turn, tokenizer.eos_token_id):
        if end is not None and end in scorer.eos_ids:
            return int(end)
    raise TokenizerError(
        f"--append-eos: the tokenizer {tokenizer.name_or_path!r} has no special token that ends a "
        "response"
    )


@contextmanager
def _open_input(file: str, err: Console) -> Iterator[BinaryIO]:
    if file == "-":
        if sys.stdin.isatty():
            _say(err, "Reading rows from the terminal; Ctrl-D ends them.")
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot read {file!r}: {error.strerror}") from error
    with stream:
        yield stream


@contextmanager
def _open_output(output: str, shown: bool, err: Console) -> Iterator[Any]:
    from cme_reward.jsonl import whole_file

    if output != "-":
        with whole_file(Path(output)) as stream:
            yield stream
    elif shown and sys.stdout.isatty():
        _say(err, "The rows themselves are not printed here; --output FILE.jsonl keeps them.")
        with open(os.devnull, "wb") as stream:
            yield stream
    else:
        yield sys.stdout.buffer


@contextmanager
def _busy(err: Console, quiet: bool, what: str) -> Iterator[None]:
    if quiet or not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


@contextmanager
def _progress(
    err: Console, quiet: bool, source: BinaryIO
) -> Iterator[Callable[[int, float], None]]:
    """A bar of rows, where someone is looking; yields what advances it."""
    if quiet or not err.is_terminal:
        yield lambda rows, speed: None
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("Scoring"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("rows  {task.fields[speed]:,.0f} tokens/s"),
        progress.TimeElapsedColumn(),
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


def _view(scored: Scored, scorer: CrossModelEntropy) -> ResponseView:
    from cme_reward.report import ResponseView, TokenView

    prompt = scored.row.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{m['role']}: {m.get('content') or ''}" for m in prompt)
    name = scored.row.fields.get("id")
    ids, logprobs = scored.verifier_tokens
    texts = [_with_bytes(token) for token in scorer.members[0].table.tokens(ids)]
    return ResponseView(
        prompt=prompt,
        label=str(name) if isinstance(name, str | int) else f"line {scored.row.line}",
        sequence_reward=scored.sequence_reward,
        generator=TokenView(
            list(map(_with_bytes, scored.tokens)), scored.token_logprobs, scored.mask
        ),
        verifier=TokenView(texts, logprobs.tolist(), [True] * len(texts)),
        dropped_nats=scored.dropped_nats,
    )


def _with_bytes(token: str) -> str:
    """`<0xF0><0x9F>` as the bytes it stands for, in the form that pictures take."""
    return re.sub(r"<0x([89A-F][0-9A-F])>", lambda byte: chr(0xDC00 + int(byte[1], 16)), token)


def _write_html(
    path: Path, views: list[ResponseView], file: str, verifier: str, generator: str | None
) -> None:
    from cme_reward.jsonl import whole_file
    from cme_reward.report import render_html

    page = render_html(
        views,
        title=f"Cross-model entropy of {'standard input' if file == '-' else Path(file).name}",
        verifier_name=verifier,
        generator_name=generator or f"{verifier} (tokenizer)",
    )
    with whole_file(path) as stream:
        stream.write(page.encode())


def _summary(counts: Counter[str], reward_sum: float, seconds: float) -> str:
    scored, tokens = counts["scored"], counts["tokens"]
    parts = [f"{scored:,} scored, {counts['bad']:,} bad{' (left out)' * (counts['bad'] > 0)}"]
    if scored:
        parts.append(f"mean sequence reward {reward_sum / scored:.3f} nats")
    if tokens:
        parts.append(f"{counts['rewarded'] / tokens:.1%} of {tokens:,} tokens have a reward")
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if counts["truncated"]:
        parts.append(f"{counts['truncated']:,} cut off at the verifier's context length")
    return "; ".join(parts)
