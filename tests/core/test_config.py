from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cme_reward import CMEConfig, ConfigError


def test_is_frozen_and_pickles() -> None:
    config = CMEConfig(eos="mask", chat_template_kwargs={"enable_thinking": False})
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eos = "score"  # type: ignore[misc]


EXAMPLE = {"prompt": "2 + 2?", "response": "4"}


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'whitespce'; did you mean 'whitespace'"):
        CMEConfig.from_dict({"whitespce": "keep"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "tokens"}, "level='tokens' is unknown; expected one of token, sequence"),
        ({"eos": "drop"}, "expected one of score, mask"),
        ({"logprob_floor": 3.0}, "logprob_floor=3.0 must be 0 or negative"),
        ({"eps": -1}, "eps=-1.0 must be 0 or a positive"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"max_length": "many"}, "max_length='many' cannot be read; expected int"),
        ({"max_length": True}, "max_length=True cannot be read; expected int or null"),
        ({"max_length": 12.5}, "max_length=12.5 cannot be read; expected int or null"),
        ({"eps": False}, "eps=False cannot be read; expected float"),
        ({"eps": None}, "eps=None cannot be read; expected float"),
        ({"system_prompt": {"a": 1}}, r"system_prompt=\{'a': 1\} cannot be read; expected text"),
        ({"chat_template_kwargs": "yes"}, "='yes' cannot be read; expected a mapping such as"),
        ({"examples": "[a]"}, r"examples\[0\]='a': expected a mapping such as"),
        ({"examples": "nowhere.jsonl"}, "='nowhere.jsonl' cannot be read as a file of JSON lines"),
        ({"examples": 3}, "examples=3 cannot be read; expected a list"),
        ({"examples": [{"prompt": "a"}]}, r"examples\[0\]=\{'prompt': 'a'\}: expected a mapping"),
        ({"examples": [EXAMPLE, {**EXAMPLE, "response": " "}]}, r"examples\[1\]=.* with text"),
    ],
)
def test_an_impossible_value_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CMEConfig.from_dict(settings)


@pytest.mark.parametrize(
    "name",
    ["level", "whitespace", "eos", "thinking", "special_tokens", "baseline", "scale"],
)
def test_choices_are_checked_however_they_come(name: str, tmp_path: Path) -> None:
    message = f"{name}='x' is unknown; expected one of "
    settings: dict[str, Any] = {name: "x"}
    (tmp_path / "cme.yaml").write_text(f"{name}: x")
    for make in (
        lambda: CMEConfig(**settings),
        lambda: dataclasses.replace(CMEConfig(), **settings),
        lambda: CMEConfig.from_dict(settings),
        lambda: CMEConfig.from_yaml(tmp_path / "cme.yaml"),
        lambda: CMEConfig.from_env(environ={f"CME_{name.upper()}": "x"}),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "cme.yaml"
    path.write_text("cme:\n  eps: 1e-4\n  scale: none\n  chat_template_kwargs: {a: false}\n")
    config = CMEConfig.from_yaml(path)
    assert config == CMEConfig(eps=1e-4, scale="none", chat_template_kwargs={"a": False})
    path.write_text("eos: mask\n")
    assert CMEConfig.from_yaml(path) == CMEConfig(eos="mask")
    path.write_text("")
    assert CMEConfig.from_yaml(path) == CMEConfig()
    # YAML has read these before us: nobody wrote "False" or "10".
    for written, read in (("no", "False"), ("012", "10"), ("1.10", "1.1")):
        path.write_text(f"system_prompt: {written}\n")
        with pytest.raises(
            ConfigError, match=rf"prompt={read} .* expected text \(in YAML, in quot"
        ):
            CMEConfig.from_yaml(path)
        path.write_text(f"system_prompt: '{written}'\n")
        assert CMEConfig.from_yaml(path).system_prompt == written
    path.write_text("- eos\n")
    with pytest.raises(ConfigError, match="holds a list"):
        CMEConfig.from_yaml(path)
    with pytest.raises(ConfigError, match=r"cannot read settings from '.*missing.yaml'"):
        CMEConfig.from_yaml(tmp_path / "missing.yaml")


def test_from_env_reads_strings_as_their_type() -> None:
    environ = {
        "CME_EPS": "0.5",
        "CME_MAX_LENGTH": "128",
        "CME_SYSTEM_PROMPT": "12",
        "CME_LOGPROB_FLOOR": "none",
        "CME_CHAT_TEMPLATE_KWARGS": "{enable_thinking: false}",
        "CME_EXAMPLES": "[{prompt: '2 + 2?', response: '4'}]",
        "CME_SHARED": "not a setting",
        "HOME": "nor this",
    }
    assert CMEConfig.from_env(environ=environ) == CMEConfig(
        eps=0.5,
        max_length=128,
        system_prompt="12",
        chat_template_kwargs={"enable_thinking": False},
        examples=[EXAMPLE],
    )


def test_examples_are_read_from_a_file_of_rows(tmp_path: Path) -> None:
    rows = [{**EXAMPLE, "id": 1}, {"prompt": "a", "response": "\u00e9\n"}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    config = CMEConfig.from_dict({"examples": str(tmp_path / "e.jsonl")})
    assert config.examples == (EXAMPLE, {"prompt": "a", "response": "\u00e9\n"})
    assert dataclasses.replace(config, eos="mask").examples == config.examples


def test_keys_with_none_keep_their_meaning() -> None:
    # scale and baseline have a value called "none"; the optional ones read it as "not set".
    config = CMEConfig.from_dict({"scale": "none", "baseline": "none", "system_prompt": None})
    assert (config.scale, config.baseline, config.system_prompt) == ("none", "none", None)


def test_changes_replace_what_a_file_says_as_it_says_it(tmp_path: Path) -> None:
    """`credit: sequence` stands for a level; another credit on the command line is one."""
    file = tmp_path / "cme.yaml"
    file.write_text("credit: sequence\neos: mask\n")
    changed = CMEConfig.from_yaml(file, {"credit": "token"})
    assert (changed.level, changed.eos) == ("token", "mask")
    assert CMEConfig.from_yaml(file, {"credit": "return"}).credit == "return"
    assert CMEConfig.from_yaml(file).level == "sequence"


def test_tags_in_brackets_are_text() -> None:
    config = CMEConfig.from_dict({"thinking_tags": "[THINK] [/THINK]"})
    assert config.thinking_tags == ("[THINK]", "[/THINK]")
    assert CMEConfig.from_dict({"thinking_tags": "[a, b]"}).thinking_tags == ("a", "b")


def test_examples_of_any_text(tmp_path: Path) -> None:
    """JSON may hold other ends of lines than its lines', and editors put a BOM in front."""
    file = tmp_path / "examples.jsonl"
    row = {"prompt": "a\u2028b", "response": "c\x85d"}
    file.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert CMEConfig(examples=str(file)).examples == (row,)
