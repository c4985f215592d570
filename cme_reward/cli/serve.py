"""The command line: `cme-reward serve`."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Annotated

import typer

from cme_reward.cli import flags
from cme_reward.cli.terminal import busy, clean_errors, stderr
from cme_reward.errors import ConfigError

_network = partial(typer.Option, rich_help_panel="Network")
_limits = partial(typer.Option, rich_help_panel="Limits")


def serve(
    verifier: Annotated[
        str,
        flags.models(
            metavar="SPEC",
            help="Who judges: embedded, hf:NAME_OR_PATH, vllm:URL, sglang:URL, python:MODULE:NAME, "
            "or several joined by +. Code that comes with a model is not run.",
        ),
    ],
    generator_tokenizer: Annotated[
        str,
        flags.models(
            metavar="NAME_OR_PATH",
            help="Tokenizer of the model that writes the responses. Its chat template is the one "
            "in which OpenRLHF's prompts come.",
        ),
    ],
    padded_vocabulary: flags.PaddedVocabulary = False,
    device: flags.Device = None,
    options: flags.VerifierOptions = None,
    settings: flags.Settings = None,
    config: flags.ConfigFile = None,
    host: Annotated[
        str, _network(help="Address to listen on. Others than this machine's own need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, _network(min=0, max=65535, help="0 is any free one.")] = 8000,
    allow_anonymous: Annotated[
        bool,
        _network("--allow-anonymous", help="Serve other machines without a token."),
    ] = False,
    max_batch_tokens: Annotated[
        int,
        _limits(min=1, metavar="N", help="Most tokens scored in one call of the verifier."),
    ] = 65_536,
    linger: Annotated[
        float | None,
        _limits(
            min=0,
            metavar="S",
            show_default="0.25 on the CPU, else 0",
            help="Longest that a free verifier waits for other rollouts to score together.",
        ),
    ] = None,
    max_requests: Annotated[
        int, _limits(min=1, metavar="N", help="Most requests held at a time; others get a 429.")
    ] = 4096,
    max_body: Annotated[
        float, _limits(min=0.001, metavar="MIB", help="Longest request; others get a 413.")
    ] = 16,
    client_seconds: Annotated[
        float,
        _limits(min=0.1, metavar="S", help="A request that takes longer to come gets a 408."),
    ] = 60,
    drain_seconds: Annotated[
        float,
        _limits(min=0, metavar="S", help="Time to answer what was accepted, after SIGTERM."),
    ] = 120,
) -> None:
    """Serve rewards over HTTP: OpenRLHF's `/get_reward`, and `/v1/score` for everyone else.

    `/docs` and `/openapi.json` describe the requests, `/health` tells whether the server takes
    them, `/metrics` is for Prometheus.

    With the environment variable `CME_SERVER_TOKEN` set, clients must send it, as
    `Authorization: Bearer TOKEN` or as the password of the URL.

    SIGTERM and Ctrl-C end the server when all accepted requests are answered; new ones get a 503.
    A second one ends it at once.

    **Exit status**: 0 everything accepted was answered, 1 something was not, 2 error.

    **Example**: `cme-reward serve --verifier hf:google/gemma-3-1b-it --generator-tokenizer
    Qwen/Qwen2.5-0.5B-Instruct`
    """
    err = stderr()
    with clean_errors(err):
        from cme_reward.cli.options import configuration, verifier_options
        from cme_reward.loading import load_tokenizer, silence
        from cme_reward.server.settings import TOKEN_VARIABLE, ServerSettings, check_host
        from cme_reward.verifiers.batching import check_linger

        settled = configuration(config, settings or [])
        keywords = verifier_options(device, options or [])
        if linger is not None:
            check_linger(linger)
        if not math.isfinite(max_body):
            raise ConfigError(f"--max-body {max_body}: expected a number of MiB")
        body = int(max_body * 2**20)
        limits = ServerSettings(
            token=os.environ.get(TOKEN_VARIABLE),
            max_requests=max_requests,
            max_body_bytes=body,
            max_held_bytes=max(16 * body, ServerSettings.max_held_bytes),
            client_seconds=client_seconds,
            drain_seconds=drain_seconds,
        )
        check_host(host, limits.token, allow_anonymous)
        try:
            from cme_reward.server import create_app
            from cme_reward.server.run import bind, in_a_passing_thread, run
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
                raise
            raise ConfigError(
                f'cme-reward serve needs {error.name}: pip install "cme-reward[serve]"'
            ) from error
        with bind(host, port) as bound:
            with busy(err, False, f"Loading {verifier}"):
                from cme_reward.verifiers import load_verifier

                silence()
                tokenizer = load_tokenizer(generator_tokenizer)
                model = in_a_passing_thread(lambda: load_verifier(verifier, **keywords))
            app = create_app(
                model,
                tokenizer,
                settled,
                limits,
                max_batch_tokens=max_batch_tokens,
                linger_seconds=linger,
                padded_vocabulary=padded_vocabulary,
            )
            status = run(app, bound, limits)
    raise typer.Exit(status)
