"""`cme-reward score`, in this process and as a program."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engines import FakeEngine
from tokenizer_kinds import load_tokenizer, shared_rows
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging
from typer.testing import CliRunner

from cme_reward import CrossModelEntropy, __version__, load_verifier
from cme_reward.cli.app import app
from cme_reward.cli.jsonl import Bad, Good, batches, read_rows
from cme_reward.verifiers.endpoint import EndpointVerifier

NEW = ["sequence_reward", "token_rewards", "mask", "tokens", "dropped_nats"]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "One?", "response": "The unhappiness of one, said Lily.", "extra": [1]},
    {"id": "b", "prompt": "One?", "response": "\n\t Größe 🤷🏽 e\u0301 <eos>  end "},
    {"id": "c", "messages": [{"role": "user", "content": "Zażółć?"}], "response": ""},
    {"id": "d", "prompt": [{"role": "user", "content": "我喜歡"}], "response": "我喜歡 ok"},
]


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def _save(path: Path, tokenizer: Any, *, uniform: bool) -> Path:
    """A tiny random GPT-2; one that says nothing gives every token 1 / vocabulary."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    if uniform:
        for weight in model.transformer.ln_f.parameters():
            torch.nn.init.zeros_(weight)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("byte-level")
    return _save(tmp_path_factory.mktemp("model"), tokenizer, uniform=False)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("byte-level")
    return _save(tmp_path_factory.mktemp("uniform"), tokenizer, uniform=True)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generator")
    load_tokenizer("sentencepiece-dummy").save_pretrained(path)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(*args: Any, stdin: str | bytes | None = None, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(map(str, args)), input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} in the output")


def parsed(text: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]


def program(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, check=False, **kwargs)


def test_rows_are_what_the_reward_gives_one_by_one(model: Path, generator: Path) -> None:
    spec = f"hf:{model}"
    result = run(
        "score", "-", "--verifier", spec, "--generator-tokenizer", generator, stdin=lines(ROWS)
    )
    scored = parsed(result.stdout)
    cme = CrossModelEntropy(load_verifier(spec), AutoTokenizer.from_pretrained(generator))
    assert [row["id"] for row in scored] == ["a", "b", "c", "d"]
    for row, out in zip(ROWS, scored, strict=True):
        assert {key: out[key] for key in row} == row
        assert list(out) == [*row, *NEW]
        ids = cme.table.encode(row["response"])[0]
        batch = cme([row["messages"] if "messages" in row else row["prompt"]], [ids])
        assert out["token_rewards"] == pytest.approx(batch.token_rewards[0].tolist(), abs=1e-5)
        assert out["mask"] == batch.mask[0].tolist()
        assert out["tokens"] == cme.table.tokens(ids)
        assert out["sequence_reward"] == pytest.approx(float(batch.sequence_rewards[0]), abs=1e-5)
        assert out["dropped_nats"] == pytest.approx(float(batch.dropped_nats[0]), abs=1e-4)
    assert "🤷" in result.stdout, "text is written as text"
    assert "4 scored, 0 bad; mean sequence reward -" in result.stderr


PRINTS = """
import os
from transformers import AutoTokenizer
load = AutoTokenizer.from_pretrained
def loud(*args, **kwargs):
    os.write(1, b"a vocabulary with holes\\n")
    return load(*args, **kwargs)
AutoTokenizer.from_pretrained = loud
from cme_reward.cli.app import main
main()
"""


def test_native_code_does_not_print_among_the_rows(generator: Path) -> None:
    """Past Python, as tokenizers did before 0.23 of a vocabulary with holes."""
    command = [sys.executable, "-c", PRINTS, "score", "-", "--generator-tokenizer", str(generator)]
    done = subprocess.run(command, capture_output=True, input=lines(ROWS[:1]).encode(), check=True)
    assert b"a vocabulary with holes" in done.stderr
    assert [row["id"] for row in parsed(done.stdout)] == ["a"]


def test_a_uniform_verifier_by_hand(uniform: Path, tmp_path: Path) -> None:
    # The generator's tokens are the verifier's. A uniform guess among V tokens is -ln V for each;
    # with V = 401 that is -5.993961. The two tokens that are only white space are masked.
    tokenizer = load_tokenizer("byte-level")
    assert len(tokenizer) == 401
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("o", "n", "e", "Ġ", "Ċ", "x")]
    file = tmp_path / "in.jsonl"
    file.write_text(lines([{"prompt": "p", "response_ids": ids}]))
    out = tmp_path / "out.jsonl"
    args = ("--verifier", f"hf:{uniform}", "--generator-tokenizer", uniform, "-o", out)
    run("score", file, *args, "--set", "whitespace=mask")
    (row,) = parsed(out.read_text())
    n_verifier = len(tokenizer.encode("one \nx", add_special_tokens=False))
    assert row["mask"] == [True, True, True, False, False, True]
    assert row["tokens"] == ["o", "n", "e", " ", "\n", "x"]
    assert row["sequence_reward"] == -5.993961
    total = sum(row["token_rewards"]) - row["dropped_nats"]
    assert total == pytest.approx(n_verifier * -5.993961, abs=1e-4)
    assert [r for r, m in zip(row["token_rewards"], row["mask"], strict=True) if not m] == [0, 0]


BAD_LINES = [
    (b"nonsense", "is not JSON"),
    (b'["a"]', 'is ["a"]; expected an object'),
    (b'{"response": "x"}', "has neither prompt nor messages"),
    (b'{"prompt": "x"}', "has neither response nor response_ids"),
    (b'{"prompt": "x", "response": null}', "has neither response nor response_ids"),
    (b'{"prompt": "x", "messages": [], "response": "x"}', "has both prompt and messages"),
    (b'{"prompt": "x", "response": "x", "response_ids": [1]}', "has both response and"),
    (b'{"prompt": 5, "response": "x"}', "prompt is 5; expected text, or a list of messages"),
    (b'{"messages": "hi", "response": "x"}', 'messages is "hi"; expected a list of messages'),
    (b'{"messages": [{"role": "user"}], "response": "x"}', "message 0 (role 'user') holds None"),
    (b'{"prompt": "x", "response": 5}', "response is 5; expected text"),
    (b'{"prompt": "x", "response_ids": "5"}', 'response_ids is "5"; expected a list of token ids'),
    (b'{"prompt": "x", "response_ids": [1, -1]}', "response_ids[1] is -1, but"),
    (b'{"prompt": "x", "response_ids": [true]}', "response_ids[0] is true"),
    (b'{"prompt": "x", "response_ids": [1.5]}', "response_ids[0] is 1.5"),
    (b'{"prompt": "x", "response_ids": [999999]}', "has ids 0 to "),
    (b'{"prompt": "x", "response_ids": [3], "response_mask": [1, 0]}', "has 2 entries; expected"),
    (b'{"prompt": "x", "response_ids": [3], "response_mask": [2]}', "response_mask[0] is 2"),
    (b'{"prompt": "x", "response": "x", "response_mask": [1]}', "expected response_ids"),
    (b'{"prompt": "x", "response": "caf\xe9"}', "is not UTF-8 (byte 0xE9"),
    (b'{"prompt": "x", "response": "\\ud83e"}', "half of a surrogate pair"),
    (b'{"prompt": "\\ud83e", "response": "x"}', "half of a surrogate pair"),
    (b'{"prompt": "x", "response": "x", "p": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "x", "response": "x", "p": 1e999}', "1e999 is too large a number"),
    (b"[" * 100_000, "is not JSON"),
]


def test_bad_lines_are_reported_and_the_others_scored(model: Path, tmp_path: Path) -> None:
    good = b'{"prompt": "x", "response": "good %d"}\n'
    content = b"\xef\xbb\xbf\n   \r\n"  # a byte order mark and blank lines are no errors
    for k, (line, _) in enumerate(BAD_LINES):
        content += good % k + line + b"\r\n"
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    result = run(
        "score", file, "--verifier", f"hf:{model}", "--generator-tokenizer", model, status=1
    )
    assert [row["response"] for row in parsed(result.stdout)] == [
        f"good {k}" for k in range(len(BAD_LINES))
    ]
    *reports, summary = result.stderr.splitlines()
    assert len(reports) == len(BAD_LINES)
    for k, (report, (_, reason)) in enumerate(zip(reports, BAD_LINES, strict=True)):
        assert report.startswith(f"line {2 * k + 4}: ")
        assert reason in report
    n = len(BAD_LINES)
    assert summary.startswith(f"{n} scored, {n} bad (left out)")


def test_one_row_that_the_template_refuses_spoils_no_other(model: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'boom' in m.content %}{{ raise_exception('too loud') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    rows = [{"prompt": f"question {k}", "response": f"answer {k}"} for k in range(9)]
    args = ("score", "-", "--verifier", f"hf:{model}", "--set", f"chat_template={template}")
    before = parsed(run(*args, stdin=lines(rows)).stdout)
    rows[3]["prompt"] = rows[8]["prompt"] = "boom"
    result = run(*args, stdin=lines(rows), status=1)
    after = parsed(result.stdout)
    assert [row["prompt"][-1] for row in after] == ["0", "1", "2", "4", "5", "6", "7"]
    for row in after:
        same = next(r for r in before if r["prompt"] == row["prompt"])
        assert row["token_rewards"] == pytest.approx(same["token_rewards"], abs=1e-5)
    assert "line 4: " in result.stderr
    assert "line 9: " in result.stderr
    assert "too loud" in result.stderr


def test_ids_need_their_tokenizer(model: Path) -> None:
    row = {"prompt": "x", "response_ids": [5, 6]}
    result = run("score", "-", "--verifier", f"hf:{model}", stdin=lines([row, ROWS[0]]), status=1)
    assert "line 1: has response_ids, but whose ids are they?" in result.stderr
    assert "--generator-tokenizer" in result.stderr
    assert len(parsed(result.stdout)) == 1


def test_parts_are_text_and_what_is_no_text_is_named(model: Path) -> None:
    said = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"prompt": "One?", "response": "one"},
        {"messages": [{"role": "user", "content": said}], "response": "one"},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "response": "one"},
        {"messages": [{"role": "user", "content": "a"}, call], "response": "one"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool"}], "response": "one"},
    ]
    result = run("score", "-", "--verifier", f"hf:{model}", stdin=lines(rows), status=1)
    text, parts = parsed(result.stdout)
    assert parts["token_rewards"] == text["token_rewards"]
    for report in (
        "line 3: message 0 (role 'user') holds {'type': 'image'}, which a verifier cannot be shown",
        "line 4: the chat template of ",
        "leaves out tool calls of message 1 (role 'assistant')",
        "line 5: message 1 (role 'tool') holds None",
    ):
        assert report in result.stderr


def test_padding_under_mask_0_and_after_the_first_end(model: Path) -> None:
    tokenizer = load_tokenizer("byte-level")
    ids = [*tokenizer.encode("one said Lily", add_special_tokens=False), tokenizer.eos_token_id]
    n = len(ids)
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "response_ids": ids},
        {"prompt": "x", "response_ids": [*ids, -100], "response_mask": [1] * n + [0]},
        {"prompt": "x", "response_ids": [*ids, ids[-1], ids[-1]]},
        {
            "prompt": "x",
            "response_ids": [ids[0], -100, *ids[1:]],
            "response_mask": [1, 0] + [1] * (n - 1),
        },
    ]
    args = ("score", "-", "--verifier", f"hf:{model}", "--generator-tokenizer", model)
    result = run(*args, stdin=lines(rows), status=1)
    alone, *padded = parsed(result.stdout)
    for row in padded:
        assert row["sequence_reward"] == alone["sequence_reward"]
        assert row["mask"][:n] == alone["mask"]
        assert not any(row["mask"][n:])
    assert "line 4: response 0, position 1 has mask 0" in result.stderr


def test_masks_and_policy_log_probs_are_honoured(model: Path) -> None:
    tokenizer = load_tokenizer("byte-level")
    ids = tokenizer.encode("one said Lily", add_special_tokens=False)
    mask = [1] * len(ids)
    mask[1] = 0
    own = [-0.5 * k for k in range(len(ids))]
    row = {"prompt": "x", "response_ids": ids, "response_mask": mask, "policy_logprobs": own}
    args = ("score", "-", "--verifier", f"hf:{model}", "--generator-tokenizer", model)
    (plain,) = parsed(run(*args, stdin=lines([row])).stdout)
    assert plain["mask"][1] is False
    assert plain["token_rewards"][1] == 0
    policy = (*args, "--set", "baseline=policy")
    (against,) = parsed(run(*policy, stdin=lines([row])).stdout)
    for k, scored in enumerate(plain["mask"]):
        if scored:
            expected = plain["token_rewards"][k] - own[k]
            assert against["token_rewards"][k] == pytest.approx(expected, abs=2e-6)
    bad = [
        {**row, "policy_logprobs": None},
        {**row, "policy_logprobs": own[1:]},
        {**row, "policy_logprobs": ["x"] * len(ids)},
        {"prompt": "x", "response": "x"},
    ]
    result = run(*policy, stdin=lines([*bad, row]), status=1)
    assert parsed(result.stdout) == [against]
    for k, reason in enumerate(("has no policy_log", "entries", '[0] is "x"', "as text"), 1):
        report = next(r for r in result.stderr.splitlines() if r.startswith(f"line {k}:"))
        assert reason in report
    assert parsed(run(*args, stdin=lines(bad[:3])).stdout), "without the baseline nobody looks"


def test_append_eos_scores_the_end_of_texts(model: Path) -> None:
    args = ("score", "-", "--verifier", f"hf:{model}")
    (without,) = parsed(run(*args, stdin=lines(ROWS[:1])).stdout)
    (with_eos,) = parsed(run(*args, "--append-eos", stdin=lines(ROWS[:1])).stdout)
    assert with_eos["tokens"] == [*without["tokens"], "<|im_end|>"]
    assert with_eos["mask"][-1] is True
    assert with_eos["token_rewards"][-1] < 0


def test_append_eos_needs_an_end_of_turn(model: Path, tmp_path: Path) -> None:
    load_tokenizer("unigram").save_pretrained(tmp_path)
    wordpiece = tmp_path / "wordpiece"
    load_tokenizer("wordpiece").save_pretrained(wordpiece)
    args = ("score", "-", "--verifier", f"hf:{model}", "--append-eos")
    result = run(*args, "--generator-tokenizer", wordpiece, stdin=lines(ROWS[:1]), status=2)
    assert "no special token that ends a response" in result.stderr


def test_scoring_an_output_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS))
    args = ("score", file, "--verifier", f"hf:{model}", "--output", file)
    run(*args)
    once = file.read_text(encoding="utf-8")
    run(*args)
    assert file.read_text(encoding="utf-8") == once
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_batch_size_changes_nothing(model: Path) -> None:
    args = ("score", "-", "--verifier", f"hf:{model}", "--batch-size")
    one = parsed(run(*args, 1, stdin=lines(ROWS)).stdout)
    all_at_once = parsed(run(*args, 100, stdin=lines(ROWS)).stdout)
    for a, b in zip(one, all_at_once, strict=True):
        assert a["token_rewards"] == pytest.approx(b["token_rewards"], abs=1e-5)


def test_neighbours_of_one_prompt_share_a_batch() -> None:
    prompts = ["a"] * 3 + ["b"] * 2 + ["c"] * 7
    rows = [Good(prompt, "", line=n, fields={}) for n, prompt in enumerate(prompts)]
    sizes = [[row.prompt for row in b if isinstance(row, Good)] for b in batches(rows, 2)]
    # 3 rows of "a" stay together, b fills a batch, c is cut at twice the size.
    assert sizes == [["a"] * 3, ["b"] * 2, ["c"] * 4, ["c"] * 3]
    assert list(batches([], 2)) == []
    with_bad = [rows[0], Bad(1, "x"), rows[1], rows[3]]
    assert [len(batch) for batch in batches(with_bad, 1)] == [2, 1, 1]


def test_reading_is_streaming() -> None:
    def stream():
        yield b'{"prompt": "x", "response": "y"}\n'
        raise AssertionError("read ahead")

    assert isinstance(next(read_rows(stream())), Good)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("missing.jsonl",), "cannot read 'missing.jsonl': No such file"),
        (("-", "--verifier", "nonsense"), "unknown verifier 'nonsense'"),
        (("-", "--verifier", "hf:no/such/place"), "cannot load verifier 'no/such/place'"),
        (("-", "--generator-tokenizer", "no/such/place"), "cannot load the tokenizer"),
        (("-", "--set", "epz=1"), "unknown setting 'epz'; did you mean 'eps'?"),
        (("-", "--set", "eos"), "expected KEY=VALUE"),
        (("-", "--set", "eos=never"), "expected one of score, mask"),
        (("-", "--verifier-option", "dtype"), "--verifier-option 'dtype': expected KEY=VALUE"),
        (("-", "--set", "max_length=long"), "max_length='long' cannot be read; expected int or"),
        (
            ("-", "--verifier-option", "trust_remote_code=maybe"),
            "--verifier-option trust_remote_code='maybe' cannot be read; expected true or false",
        ),
        (("-", "--verifier-option", "batch_tokens=0"), "must both be at least 1"),
        (("-", "--verifier", "vllm:localhost:8000"), "is no URL of a verifier server"),
        (
            ("-", "--verifier", "vllm:http://localhost:8000", "--device", "cpu"),
            "device='cpu' is no option of a verifier behind HTTP",
        ),
        (("-", "--config", "missing.yaml"), "cannot read settings from 'missing.yaml'"),
        (("-", "--output", "missing/out.jsonl"), "cannot write 'missing/out.jsonl'"),
        (("-", "--html", "missing/out.html"), "the directory missing does not exist"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(
    args: tuple[str, ...],
    reason: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--verifier" not in args:
        args = (*args, "--verifier", f"hf:{model}")
    result = run("score", *args, stdin=lines(ROWS), status=2)
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_failure_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    run("score", "-", "--verifier", "nonsense", "-o", out, stdin=lines(ROWS), status=2)
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_settings_come_from_a_file_and_from_the_command_line(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "cme.yaml"
    config.write_text("whitespace: mask\neos: mask\n")
    row = {"prompt": "x", "response": "a \n\n b"}
    args = ("score", "-", "--verifier", f"hf:{model}", "--append-eos", "--config", config)
    (paper,) = parsed(run(*args, stdin=lines([row])).stdout)
    assert paper["mask"] == [t.strip() not in ("", "<|im_end|>") for t in paper["tokens"]]
    assert set(paper["mask"][:-1]) == {True, False}
    (kept,) = parsed(run(*args, "--set", "whitespace=keep", stdin=lines([row])).stdout)
    assert kept["mask"] == [True] * (len(kept["mask"]) - 1) + [False]
    (both,) = parsed(
        run(*args, "--set", "eos=score", "--set", "whitespace=keep", stdin=lines([row])).stdout
    )
    assert all(both["mask"])


def test_no_rows_and_no_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("score", "-", "--verifier", f"hf:{model}", "-o", out, stdin="\n\n")
    assert out.read_text() == ""
    assert "0 scored, 0 bad" in result.stderr
    # Half a surrogate pair in a field that is only passed on is written as it came.
    row = '{"prompt": "x", "response": "y", "note": "\\ud83e"}\n'
    scored = run("score", "-", "--verifier", f"hf:{model}", "--quiet", stdin=row)
    assert parsed(scored.stdout)[0]["note"] == "\ud83e"
    assert scored.stderr == ""


def test_a_heat_map_in_html_and_in_the_terminal(model: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "report.html", tmp_path / "out.jsonl"
    result = run(
        *("score", "-", "--verifier", f"hf:{model}", "--html", page, "--html-limit", 2),
        *("--show", 1, "-o", out),
        stdin=lines(ROWS),
    )
    html = page.read_text(encoding="utf-8")
    assert html.count("<article>") == 2
    assert "🤷" in html
    assert "No verifier tokens were recorded" not in html
    assert f"{page} holds the first 2 responses" in result.stderr.replace("\n", "")
    assert "surprise in nats" in result.stderr
    assert "Größe" not in result.stderr
    assert result.stdout == ""
    assert len(parsed(out.read_text(encoding="utf-8"))) == 4


def test_responses_beyond_the_context_are_counted(model: Path) -> None:
    rows = [{"prompt": "x", "response": "happiness " * 200}, ROWS[0]]
    result = run("score", "-", "--verifier", f"hf:{model}", stdin=lines(rows))
    assert "1 cut off at the verifier's context length" in result.stderr
    assert not parsed(result.stdout)[0]["mask"][-2]


def test_the_embedded_verifier_is_the_default() -> None:
    first, second = parsed(run("score", "-", stdin=lines(ROWS[:2])).stdout)
    assert first["sequence_reward"] > second["sequence_reward"]
    assert math.isclose(
        len(first["tokens"]) * first["sequence_reward"],
        sum(first["token_rewards"]) - first["dropped_nats"],
        rel_tol=1e-4,
    )


def test_a_server_judges(model: Path) -> None:
    tokenizer = load_tokenizer("byte-level")
    with FakeEngine("vllm", tokenizer) as server:
        spec, options = f"vllm:{server.url}", ("--verifier-option", f"tokenizer={model}")
        result = run("score", "-", "--verifier", spec, *options, stdin=lines(ROWS[:1]))
        (row,) = parsed(result.stdout)
        with EndpointVerifier("vllm", [server.url], tokenizer=tokenizer) as verifier:
            ids = tokenizer.encode(ROWS[0]["response"], add_special_tokens=False)
            batch = CrossModelEntropy(verifier, tokenizer)([ROWS[0]["prompt"]], [ids])
    assert row["sequence_reward"] == pytest.approx(float(batch.sequence_rewards[0]), abs=1e-5)
    refused = run("check-pair", model, spec, status=2)
    assert "its tokenizer is that of the model it runs" in refused.stderr


def test_an_ensemble_takes_the_first_members_tokenizer(model: Path, uniform: Path) -> None:
    spec = f"hf:{uniform}+hf:{model}"
    (row,) = parsed(run("score", "-", "--verifier", spec, stdin=lines(ROWS[:1])).stdout)
    tokenizer = load_tokenizer("byte-level")
    assert len(row["tokens"]) == len(
        tokenizer.encode(ROWS[0]["response"], add_special_tokens=False)
    )


def test_help_and_version() -> None:
    assert run("--version").stdout == f"cme-reward {__version__}\n"
    overview = run("--help").stdout
    assert "score" in overview
    assert "check-pair" in overview
    text = run("score", "--help").stdout
    for word in ("response_ids", "dropped_nats", "--append-eos", "embedded", "Exit status"):
        assert word in text
    assert "--json" in run("check-pair", "--help").stdout


@pytest.mark.slow
def test_as_a_program_in_a_pipe(model: Path) -> None:
    done = program("score", "-", "--verifier", f"hf:{model}", input=lines(ROWS).encode())
    assert done.returncode == 0
    assert [row["id"] for row in parsed(done.stdout)] == ["a", "b", "c", "d"]
    assert len(done.stderr.splitlines()) == 1, "only the summary where nobody looks"
    assert program("score", "--nonsense").returncode == 2
    bad = program("score", "-", "--verifier", f"hf:{model}", input=b"nonsense\n")
    assert (bad.returncode, bad.stdout) == (1, b"")
    assert bad.stderr.startswith(b"line 1: is not JSON")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()"]
    done = subprocess.run(
        [*command, "score", "-", "--verifier", f"hf:{model}", "-q"],
        input=lines(ROWS).encode(),
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_scored_under_another_name(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()"]
    with subprocess.Popen(
        [*command, "score", "-", "--verifier", f"hf:{model}", "--batch-size", "1", "-o", str(out)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(lines(ROWS[:3]).encode())
        process.stdin.flush()
        for _ in range(600):
            if partial.exists() and partial.read_bytes().count(b"\n") >= 1:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        message = process.stderr.read().decode()
        assert process.wait() == 130
    assert not out.exists()
    assert parsed(partial.read_text(encoding="utf-8"))[0]["id"] == "a"
    assert message == f"interrupted\nthe rows scored so far are in {partial}\n"


@pytest.mark.slow
def test_progress_is_shown_to_a_terminal(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()"]
    process = subprocess.Popen(
        [*command, "score", str(file), "--verifier", f"hf:{model}", "-o", os.devnull],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        screen += chunk
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    assert re.search(r"Scoring .* 4/4 rows +[\d,]+ tokens/s", text)
    assert "Loading weights" not in text


def test_a_models_own_tokens_get_its_own_log_probs(model: Path) -> None:
    """Oracle: one plain forward pass."""
    tokenizer = load_tokenizer("byte-level")
    ids = tokenizer.encode("happiness of\n\n another, ok", add_special_tokens=False)
    args = ("--verifier", f"hf:{model}", "--generator-tokenizer", model)
    row = {"prompt": "x", "response_ids": ids}
    (out,) = parsed(run("score", "-", *args, stdin=lines([row])).stdout)
    prompt = tokenizer.encode("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")
    network = GPT2LMHeadModel.from_pretrained(model)
    with torch.no_grad():
        logits = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(ids)), ids]
    assert out["token_rewards"] == pytest.approx(expected.tolist(), abs=2e-5)


def test_real_rollouts_get_the_log_probs_they_were_sampled_with(shared: Path | None) -> None:
    if shared is None:
        return  # the test above does the same with random weights
    rows = [r for r in shared_rows("dev_tinylm") if r["meta"]["reencode_equals_sampled"]]
    given = [{"prompt": row["prompt"], "response_ids": row["meta"]["response_ids"]} for row in rows]
    result = run(
        *("score", "-", "--verifier", f"hf:{shared / 'models' / 'stories260K'}"),
        *("--generator-tokenizer", shared / "tokenizers" / "tok512"),
        stdin=lines(given),
    )
    scored = parsed(result.stdout)
    assert len(scored) == len(rows) > 20
    for row, out in zip(rows, scored, strict=True):
        assert out["token_rewards"] == pytest.approx(row["meta"]["response_logprobs"], abs=2e-5)
