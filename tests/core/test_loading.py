"""What the commands load, and where."""

import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cme_reward.verifiers
from cme_reward.cli.app import app
from cme_reward.errors import ConfigError, TokenizerError
from cme_reward.loading import load_tokenizer
from cme_reward.server import run
from cme_reward.server.run import in_a_passing_thread


def test_a_verifier_is_loaded_in_a_thread_that_ends():
    thread = in_a_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(60)
    assert not thread.is_alive()


def test_what_fails_there_is_raised_here():
    def fail() -> None:
        raise ConfigError("dtype='half': expected a dtype of torch")

    with pytest.raises(ConfigError, match="expected a dtype of torch"):
        in_a_passing_thread(fail)


def test_whatever_ends_it_ends_the_wait():
    def leave() -> None:
        raise SystemExit("out of the model's own code")

    with pytest.raises(SystemExit, match="own code"):
        in_a_passing_thread(leave)


def test_serve_loads_its_verifier_there(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, served = [], []
    load = cme_reward.verifiers.load_verifier

    def load_verifier(*args: Any, **options: Any) -> Any:
        loaded.append(threading.current_thread())
        return load(*args, **options)

    monkeypatch.setattr(cme_reward.verifiers, "load_verifier", load_verifier)
    monkeypatch.setattr(run, "run", lambda app, bound, settings: served.append(app) or 0)
    generator = str(Path(__file__).parents[2] / "examples" / "generator")
    command = ["serve", "--verifier", "embedded", "--generator-tokenizer", generator]
    result = CliRunner().invoke(app, [*command, "--port", "0", "--linger", "0.5"])
    assert result.exit_code == 0, result.output
    assert loaded[0] is not threading.current_thread()
    assert served[0].state.verifier.linger_seconds == 0.5


def test_a_plus_in_a_folders_name_is_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    load_tokenizer("embedded").save_pretrained(folder)
    for name in (str(folder), f"hf:{folder}", f"random:{folder}"):
        assert load_tokenizer(name).name_or_path == str(folder)
    with pytest.raises(TokenizerError, match="names several verifiers; expected one"):
        load_tokenizer(f"hf:{folder}+embedded")
    with pytest.raises(TokenizerError, match="is a verifier of your own; expected the name"):
        load_tokenizer("python:mine:make")
