"""`cme-reward rank`, with the embedded verifier."""

from __future__ import annotations

import gzip
import html
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_kinds import SHARED, shared_rows
from typer.testing import CliRunner

from cme_reward import CMEConfig, CrossModelEntropy, load_verifier
from cme_reward.cli.app import app
from cme_reward.ranking.remember import Remembering

ROWS: list[dict[str, Any]] = [
    {"id": 1, "prompt": "What is 2 + 2?", "response": "2 + 2 = 4", "meta": {"right": True}},
    {"id": 2, "prompt": "What is 2 + 2?", "response": "2 + 2 = 7 xq", "meta": {"right": False}},
    {"id": 3, "prompt": "Say hello.", "response": "Hello, hello!", "meta": {"right": True}},
    {"id": 4, "prompt": "Say hello.", "response": "zzkq ölß", "meta": {"right": False}},
    {"id": 5, "prompt": "Say hello.", "response": "Hi", "meta": {}},
]


@pytest.fixture(scope="module")
def verifier() -> Any:
    return load_verifier("embedded")


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(*args: Any, stdin: str | None = None, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["rank", *map(str, args)], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def found(*args: Any, rows: list[Any] = ROWS, status: int = 0) -> dict[str, Any]:
    return json.loads(run("-", "--json", *args, stdin=lines(rows), status=status).stdout)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["name"]: score for score in report["scores"]}


def test_scores_are_those_of_the_reward(verifier: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    also = ("--also", "eos=mask", "--also", "logprob_floor=-2 eos=mask")
    run("-", "--append-eos", *also, "-o", out, "-q", stdin=lines(ROWS))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: row[k] for k in ROWS[0]} for row in rows] == ROWS
    configs = {
        "": CMEConfig(),
        ", eos=mask": CMEConfig(eos="mask"),
        ", logprob_floor=-2 eos=mask": CMEConfig(eos="mask", logprob_floor=-2),
    }
    for called, config in configs.items():
        reward = CrossModelEntropy(verifier, config=config)
        ids = [
            [*reward.table.encode(r["response"])[0].tolist(), reward.generator.end_of_turn]
            for r in ROWS
        ]
        batch = reward([r["prompt"] for r in ROWS], ids)
        for row, mean, (_, logp) in zip(
            rows, batch.sequence_rewards.tolist(), batch.verifier_tokens, strict=True
        ):
            scores = row["scores"]
            assert scores[f"embedded{called}: mean (Eq. 3)"] == pytest.approx(mean, abs=1e-5)
            assert scores[f"embedded{called}: sum"] == pytest.approx(logp.sum(), abs=1e-4)
            worst = np.sort(logp)[:3].mean()
            assert scores[f"embedded{called}: worst 3 tokens"] == pytest.approx(worst, abs=1e-4)
    first = "embedded: mean (Eq. 3)"
    for prompt in {row["prompt"] for row in rows}:
        own = [row for row in rows if row["prompt"] == prompt]
        ordered = sorted(own, key=lambda row: -row["scores"][first])
        assert [row["rank"] for row in ordered] == list(range(1, len(own) + 1))
    run("-", "--append-eos", "--best", "-o", out, "-q", stdin=lines(ROWS))
    assert [json.loads(x)["id"] for x in out.read_text().splitlines()] == [
        row["id"] for row in rows if row["rank"] == 1
    ]


def test_a_text_is_read_once_for_all_settings(verifier: Any) -> None:
    asked: list[int] = []

    class Counting:
        name, tokenizer = "counting", verifier.tokenizer
        max_length, vocab_size = 512, len(verifier.tokenizer)

        def logprobs(self, prompts: Any, responses: Any) -> list[Any]:
            asked.extend(map(len, responses))
            return [np.arange(len(r), dtype=float) * -0.5 for r in responses]

    memory = Remembering(Counting())
    assert [x.tolist() for x in memory.logprobs([[1]], [[5, 6, 7]])] == [[0, -0.5, -1]]
    again = memory.logprobs([[1], [1], [2]], [[5, 6], [5, 8], [5, 6]])
    assert [x.tolist() for x in again] == [[0, -0.5]] * 3
    assert asked == [3, 2, 2]  # [5, 6] after [1] was known
    memory.forget()
    memory.logprobs([[1]], [[5, 6]])
    assert asked == [3, 2, 2, 2]


def test_labels_pairs_and_the_verdict() -> None:
    report = found("--label", "meta.right")
    assert (report["responses"], report["prompts"], report["pairs"]) == (5, 2, 2)
    scores = by_name(report)
    assert scores["embedded: mean (Eq. 3)"]["accuracy"][0] == 1.0
    assert scores["embedded: mean (Eq. 3)"]["auroc"] == 0.75  # "Hello" is below "7 xq"
    assert report["random_of_n"] == 0.5
    upside_down = [{**row, "meta": {"right": not row["meta"].get("right")}} for row in ROWS[:4]]
    report = found("--label", "meta.right", rows=upside_down, status=3)
    assert report["verdict"]["colour"] == "red"
    assert "WORSE" in report["verdict"]["text"]
    shown = run("-", "--label", "meta.right", stdin=lines(upside_down), status=3)
    assert "STOP" in shown.stdout


def test_preferences_are_compared_within_their_line() -> None:
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    said = [
        {"role": "assistant", "content": "2 + 2 = 4"},
        {"role": "assistant", "content": "xq zz"},
    ]
    rows = [
        {"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": "xq zz"},
        {"prompt": asked, "chosen": said[:1], "rejected": said[1:]},
        {"chosen": [*asked, said[0]], "rejected": [*asked, said[1]]},
    ]
    report = found(rows=rows)
    assert (report["responses"], report["pairs"]) == (6, 3)
    means = by_name(report)["embedded: mean (Eq. 3)"]
    assert means["accuracy"][0] == 1.0
    result = run("-", stdin=lines([{"chosen": "a", "rejected": "b"}, *rows]), status=1)
    assert "line 1: has no prompt" in result.stderr
    result = run("-", stdin=lines([{"prompt": "a", "chosen": 3, "rejected": "b"}]), status=2)
    assert "chosen is 3; expected text, or messages" in result.stderr


def test_bad_lines_are_named_and_the_others_ranked() -> None:
    rows = [*ROWS, {"prompt": "x", "response": "y", "meta": {"right": "yes"}}, {"prompt": "x"}]
    result = run("-", "--label", "meta.right", stdin=lines(rows) + "{\n", status=1)
    assert 'line 6: meta.right is "yes"; expected true, false or a number' in result.stderr
    assert "line 7: " in result.stderr
    assert "line 8: is not JSON" in result.stderr
    assert "5 responses to 2 prompts, 4 labelled" in result.stdout


def test_where_limit_and_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(lines(ROWS))
    report = json.loads(run(path, "--json", "--where", "meta.right=true").stdout)
    assert report["responses"] == 2
    assert json.loads(run(path, "--json", "--limit", "1").stdout)["responses"] == 2
    assert "--where 'meta'" in run(path, "--where", "meta", status=2).stderr
    assert "no line is what --where id=9 asks" in run(path, "--where", "id=9", status=2).stderr
    result = run(path, "--also", "eoss=mask", status=2)
    assert "eoss" in result.stderr
    assert "eos" in result.stderr
    assert "does not exist" in run(path, "--html", tmp_path / "no" / "x.html", status=2).stderr


def test_verifiers_beside_each_other_and_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    embedded = Path(load_verifier.__code__.co_filename).parent / "embedded"
    report = found(
        "--verifier", "embedded", "--verifier", f"random:{embedded}", "--label", "meta.right",
        "--html", page,
    )  # fmt: skip
    assert report["verdict"]["text"].split(": ")[0].endswith("embedded")
    (other,) = report["other_verdicts"]
    assert "random:embedded: mean (Eq. 3) puts the better response first" in other["text"]
    assert other["text"] in html.unescape(page.read_text())
    assert [part["pairs"] for part in report["by_length"]] == [0, 1, 1, 0, 0]
    assert report["risk_coverage"] == {"coverage": [0.5, 1.0], "risk": [0.0, 0.0]}
    (agreement,) = report["agreement"]
    assert agreement["pairs"] == 4  # of 2 and 3 responses
    assert agreement["verifiers"][1].startswith("random:embedded")
    text = page.read_text()
    assert "<script>alert" not in text
    assert "Risk and coverage" in text
    unlabelled = [
        {**row, "response": row["response"] + "<script>alert(1)</script>"} for row in ROWS
    ]
    found("--html", page, rows=unlabelled)
    text = page.read_text()
    assert "<script>alert" not in text
    assert "Risk and coverage" not in text
    assert "--label FIELD" in text


@pytest.mark.skipif(SHARED is None, reason="needs the texts of CME_SHARED")
def test_the_embedded_verifier_on_real_solutions() -> None:
    """The figure that docs/benchmarks.md had from another program, on the first 20 questions."""
    rows = shared_rows("dev_gsm8k")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:20]
    rows = [row for row in rows if row["prompt"] in prompts]
    report = found("--append-eos", "--label", "meta.is_correct", rows=rows)
    assert (report["prompts"], report["pairs"]) == (20, 86)
    scores = by_name(report)
    mean = scores["embedded: mean (Eq. 3)"]
    assert mean["accuracy"][0] == pytest.approx(38 / 86, abs=1e-6)
    assert report["verdict"]["colour"] == "red"


def test_standard_output_may_be_closed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(ROWS))
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()", "score"]
    command += ["in.jsonl", "-q", "-o", "out.jsonl"]
    shell = f"{shlex.join(command)} >&-"
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(ROWS)


def test_the_verdict_is_on_the_setting_asked_for_first() -> None:
    """Not on the one that is read first, which scores the end of turn."""
    report = found("--append-eos", "--set", "eos=mask", "--also", "eos=score")
    names = [score["name"] for score in report["scores"]]
    assert names[0] == "embedded: mean (Eq. 3)"
    assert names[3] == "embedded, eos=score: mean (Eq. 3)"
    plain = by_name(found("--append-eos", "--set", "eos=mask"))
    assert by_name(report)[names[0]] == plain[names[0]]


ONE = ("--where", "id=5")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--label", "meta.rigth"), "--label meta.rigth: no line has a value in the field"),
        (("--label", "meta.rigth"), "line 1 has id, prompt, response, meta, meta.right. Name one"),
        ((*ONE, "--label", "meta.right"), "no line that --where leaves has a value in the field"),
        (("--where", "meta.rigth=true"), "--where meta.rigth: no line has a value in the field"),
        (("--where", "id=1", "--where", "id=77"), "no line is what --where id=1 --where id=77"),
    ],
)
def test_a_field_that_no_line_has_is_an_error_before_anything_is_loaded(
    options: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cme_reward.cli.options.make_scorer", pytest.fail)
    result = run("-", *options, "-o", tmp_path / "out", stdin=lines(ROWS), status=2)
    assert says in " ".join(result.stderr.split())
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_the_same_of_a_pipe_which_cannot_be_looked_through(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("cme-reward")
    command = [str(program), "rank", "-", "--label", "right"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")],
        input=lines(ROWS), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--label right: no line has a value in the field 'right'" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_lines_that_are_bad_are_told_of_before_a_field_they_lack() -> None:
    result = run("-", "--label", "right", stdin='{"prompt": 3}\n', status=2)
    assert "line 1: prompt is 3" in result.stderr
    assert "holds no response that could be scored" in " ".join(result.stderr.split())


def test_wrong_input_is_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(lines(ROWS).encode())[:-12])
    assert "error: Compressed file ended" in run(cut, status=2).stderr
