"""`cme-reward evaluate`, with judges in Python and behind a server that misbehaves."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import SHARED, shared_rows
from typer.testing import CliRunner
from waiting import PATIENCE, until

import cme_reward
from cme_reward.cli.app import app
from cme_reward.evaluation import http_judge, run

JUDGES = """
def longer(prompt, first, second):
    a, b = len(first), len(second)
    return f"It is longer. \\ud83d\\nVERDICT: {'A' if a > b else 'B' if b > a else 'TIE'}"

def first(prompt, first, second):
    return {"verdict": "A", "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}

def refusing(prompt, first, second):
    return "I would rather not say."
"""


class Server(ThreadingHTTPServer):
    """Chat completions that misbehave as the question says; it counts what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.answered = 0
        self.keys: set[str | None] = set()
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.at_first: float = math.inf
        """Questions that are answered before `more` is set; the others wait for it."""
        self.more = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("judge", 0)
        self.logprobs = (body.get("logprobs"), body.get("top_logprobs")) == (True, 20)
        text = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked[text] += 1
            self.server.keys.add(self.headers.get("Authorization"))
            times, held = self.server.asked[text], self.server.asked.total() > self.server.at_first
        if held:
            self.server.more.wait(PATIENCE)
        if "hang" in text:
            self.server.closing.wait(5)
        elif "busy" in text and times == 1:
            self._send(429, "slow down", {"Retry-After": "0.3"})
        elif "broken" in text or ("shaky" in text and times < 3):
            self._send(503, "out of order")
        elif "forbidden" in text:
            self._send(401, "who are you?")
        elif "too long" in text:
            self._send(400, "context length exceeded")
        elif "web page" in text:
            self._send(200, "<html>hello</html>")
        elif "refuse" in text:
            self._reply({"content": None, "refusal": "I cannot help with that."})
        elif "nonsense" in text:
            self._reply({"content": "Both are nice. VERDICT: both"})
        elif "no alternatives" in text and self.logprobs:
            self._send(400, "logprobs are not supported by this model")
        else:
            verdict = _better(text)
            message = {"content": f"It is better.\nVERDICT: {verdict}"}
            self._reply(message, "silent" not in text and self.logprobs and chances_of(verdict))

    def _reply(self, message: dict[str, Any], logprobs: Any = None) -> None:
        usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
        with self.server.lock:
            self.server.answered += 1
        choice = {"message": message, "logprobs": logprobs or None}
        self._send(200, json.dumps({"choices": [choice], "usage": usage}))

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None: ...


def chances_of(verdict: str) -> dict[str, Any]:
    """Tokens of the reply; its verdict has 0.8, the other one 0.1, a tie 0.06, the rest 0.04."""
    other = {"A": "B", "B": "A"}[verdict]
    chances = {f" {verdict}": 0.8, f" {other}": 0.1, " T": 0.06, " C": 0.04}
    top = [{"token": text, "logprob": math.log(p)} for text, p in chances.items()]
    tokens = ["It is better.", "\n", "VERDICT", ":", f" {verdict}"]
    return {"content": [{**top[0], "token": text, "top_logprobs": top} for text in tokens]}


def _better(text: str) -> str:
    return "A" if "good" in text.split("=== RESPONSE A")[1].split("=== END")[0] else "B"


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with judges in it, and attempts that follow each other at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(http_judge, "FIRST_WAIT", 0.01)
    monkeypatch.delitem(sys.modules, "some_judges", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_judges.py").write_text(JUDGES)
    return tmp_path


def evaluate(*args: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(prompts: list[str], new: Callable[[str], str] = lambda p: "good") -> list[Any]:
    return [
        {"prompt": prompt, "response": said, "model": model}
        for prompt in prompts
        for model, said in (("old", "poor"), ("new", new(prompt)))
    ]


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation" / "report.json").read_text())


def journal(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "evaluation" / "judgments.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_judge_in_python_and_the_reports(folder: Path) -> None:
    rows = [
        {"prompt": "a", "response": "longest", "model": "old"},
        {"prompt": "a", "response": "short", "model": "new"},
        {"prompt": "b", "response": "x", "model": "old"},
        {"prompt": "b", "response": "<script>alert(1)</script>", "model": "new"},
        {"prompt": "c", "response": "same", "model": "old"},
        {"prompt": "c", "response": "size", "model": "new"},
        {"prompt": "d", "response": "alone", "model": "new"},
    ]
    file = write(folder / "all.jsonl", rows)
    result = evaluate(file, "--judge", "python:some_judges:longer", "--both-orders")
    assert "3 pairs, against old" in result.stdout
    assert "0.50 [" in result.stdout
    (row,) = found(folder)["results"]
    assert (row["wins"], row["ties"], row["losses"], row["n"]) == (1, 1, 1, 3)
    assert row["win_rate"][0] == 0.5
    lines = journal(folder)
    assert len(lines) == 6
    assert {line["reason"] for line in lines} == {"It is longer. \ud83d"}  # half a character
    assert all(line["seconds"] >= 0 and line["models"] == ["new", "old"] for line in lines)
    page = (folder / "evaluation" / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<article") == 3
    assert 'id="f-loss"' in page


def test_files_in_any_order_and_models_by_their_names(folder: Path) -> None:
    rows = {m: [r for r in answers(["a", "b", "c", "d"]) if r["model"] == m]
            for m in ("old", "new")}  # fmt: skip
    for name, own in rows.items():
        unnamed = [{k: v for k, v in row.items() if k != "model"} for row in own]
        write(folder / f"{name}.jsonl", unnamed[::-1])
    both = write(folder / "both.jsonl", [*rows["old"], *rows["new"]])
    judge = ("--judge", "python:some_judges:first", "--seed", 3, "--against", "old")
    seen = []
    for files in (["old.jsonl", "new.jsonl"], ["new.jsonl", "old.jsonl"], [both]):
        evaluate(*files, *judge)
        seen.append((found(folder)["results"], len(journal(folder))))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == 4  # the journal knew them
    orders = {line["order"][0] for line in journal(folder)}
    assert orders == {"old", "new"}


def test_a_judge_of_position_is_inconsistent_and_abstained_from(folder: Path) -> None:
    file = write(folder / "all.jsonl", answers(["a", "b"]))
    judge = ("--judge", "python:some_judges:first", "--both-orders")
    evaluate(file, *judge, "--price-in", 2, "--price-out", 10)
    report = found(folder)
    assert (report["results"][0]["ties"], report["results"][0]["inconsistent"]) == (2, 2)
    assert report["cost_usd"] == pytest.approx(4 * (1000 * 2 + 10 * 10) / 1e6)
    evaluate(file, *judge, "--abstain-above", 0.6)
    (row,) = found(folder)["results"]
    assert (row["n"], row["abstained"], row["win_rate"][0]) == (0, 2, None)


def test_several_judges_and_their_agreement(folder: Path) -> None:
    file = write(folder / "all.jsonl", answers(list("abcdefgh")))
    evaluate(
        file, "--judge", "python:some_judges:longer", "--judge", "python:some_judges:first",
        "--judge", "python:some_judges:refusing", status=1,
    )  # fmt: skip
    report = found(folder)
    assert [row["n"] for row in report["results"]] == [8, 8, 0]
    assert report["results"][2]["unreadable"] == 8
    assert [one["pairs"] for one in report["agreement"]] == [8, 0, 0]
    assert [(one["judges"], one["n"]) for one in report["means"]] == [(3, 0)]  # one says nothing
    result = evaluate(
        file, "--judge", "python:some_judges:longer", "--judge", "python:some_judges:first"
    )
    (mean,), rates = found(folder)["means"], [r["win_rate"][0] for r in found(folder)["results"]]
    assert (mean["n"], mean["win_rate"][0]) == (8, sum(rates) / 2)
    assert "new, mean of 2 judges: " in result.stdout
    page = (folder / "evaluation" / "report.html").read_text()
    assert "new, mean of 2 judges: " in page


def test_log_probs_make_the_preference(server: Server, folder: Path) -> None:
    # Of A, B and TIE 0.8, 0.1 and 0.06: (0.8 + 0.03) / 0.96 for the one that is better.
    file = write(folder / "all.jsonl", answers(list("abc")))
    judge = (file, "--judge", server.url, "--judge-model", "judge")
    evaluate(*judge)
    assert found(folder)["results"][0]["win_rate"][0] == 1
    soft = (*judge, "--judge-logprobs")
    evaluate(*soft, "--both-orders")
    (row,) = found(folder)["results"]
    assert row["win_rate"][0] == pytest.approx(0.83 / 0.96, abs=1e-5)
    assert (row["wins"], row["n"], row["inconsistent"]) == (3, 3, 0)
    lines = journal(folder)
    assert len(lines) == 3 + 6  # a verdict alone answers no question for log-probs
    assert all(sorted(line["chances"]) == [0.0625, 0.104167, 0.833333] for line in lines[3:])
    # Their entropy is 0.397, in one order as in both.
    evaluate(*soft, "--abstain-above", 0.39)
    assert found(folder)["results"][0]["abstained"] == 3
    evaluate(*soft, "--abstain-above", 0.4)
    assert found(folder)["results"][0]["abstained"] == 0
    assert len(journal(folder)) == 9
    assert "chances of A, B, TIE" in (folder / "evaluation" / "report.html").read_text()


def test_a_server_without_log_probs_ends_it(server: Server, folder: Path) -> None:
    for prompt, came in (("silent", "gives none"), ("no alternatives", "answers HTTP 400")):
        file = write(folder / "all.jsonl", answers([prompt]))
        judge = (file, "--judge", server.url, "--judge-model", "judge")
        said = " ".join(evaluate(*judge, "--judge-logprobs", status=2).stderr.split())
        assert "asked for logprobs: true, top_logprobs: 20" in said
        assert came in said
        assert "leave out --judge-logprobs" in said
        assert journal(folder) == []
    said = evaluate(
        file, "--judge", "python:some_judges:first", "--judge-logprobs", status=2
    ).stderr
    assert "--judge-logprobs needs each --judge behind HTTP" in " ".join(said.split())


def test_a_limit_from_labelled_pairs(folder: Path) -> None:
    """The judge sees length: right of 60 labelled prompts, at odds with itself on 20 more."""
    rows = answers([str(k) for k in range(100)], lambda p: "longer" if int(p) < 60 else "same")
    for k, row in enumerate(rows):
        if k < 160:
            row["meta"] = {"good": row["model"] == "new"}
    file = write(folder / "all.jsonl", rows)
    judge = (file, "--judge", "python:some_judges:longer", "--both-orders", "--label", "meta.good")
    evaluate(*judge, "--abstain-risk", 0.1)
    report = found(folder)
    (one,) = report["calibration"]
    assert (one["pairs"], one["kept"], one["wrong"], one["coverage"]) == (80, 60, 0, 0.75)
    assert one["risk_bound"] == pytest.approx(1 - 0.00625 ** (1 / 60), abs=1e-6)
    assert (report["results"][0]["wins"], report["results"][0]["abstained"]) == (60, 40)
    assert "of 80 labelled pairs it keeps 60" in (folder / "evaluation/report.html").read_text()
    said = " ".join(evaluate(*judge, "--abstain-risk", 0.05, status=2).stderr.split())
    assert "0 of 60 wrong" in said
    assert "at this share, 99 would do" in said  # 1 - 0.00625^(1/99) = 0.04997
    for k, row in enumerate(rows):  # the same, of pairs
        good = {"vs": "old", "p_win": 1} if row["model"] == "new" and k < 160 else None
        row["meta"] = {"good": good}
    evaluate(write(file, rows), *judge[1:], "--abstain-risk", 0.1)
    assert found(folder)["calibration"] == [one]


def test_each_misbehaviour_is_counted_as_what_it_is(server: Server, folder: Path) -> None:
    kinds = ["fine", "busy", "shaky", "nonsense", "refuse", "hang", "broken", "too long"]
    file = write(folder / "all.jsonl", answers([*kinds, "web page"]))
    judge = ("--judge", server.url, "--judge-model", "judge", "--timeout", 0.5, "--retries", 2)
    result = evaluate(file, *judge, "--price-in", 1, "--price-out", 1, status=1)
    (row,) = found(folder)["results"]
    assert (row["wins"], row["ties"], row["losses"]) == (3, 0, 0)
    assert (row["unreadable"], row["failed"], row["n"]) == (2, 4, 3)
    assert found(folder)["cost_usd"] == pytest.approx(5 * 1010 / 1e6)
    assert "4 failed, not counted" in result.stderr
    asked = {kind: n for text, n in server.asked.items() for kind in [*kinds, "web page"]
             if f"\n{kind}\n" in text}  # fmt: skip
    once = {"fine": 1, "nonsense": 1, "refuse": 1, "too long": 1}
    assert asked == {**once, "busy": 2, "shaky": 3, "hang": 3, "broken": 3, "web page": 3}
    why = {line["reply"] for line in journal(folder) if line["verdict"] == "failed"}
    told = " ".join(result.stderr.split()).partition("the first failed with: ")[2]
    assert any(told.startswith(" ".join(reply.split())[:80]) for reply in why)
    assert "no answer within 0.5 s (3 attempts)" in why
    assert "HTTP 503: out of order (3 attempts)" in why
    assert "I cannot help with that." in {line["reply"] for line in journal(folder)}
    server.asked.clear()
    evaluate(file, *judge, status=1)  # what failed is asked again, and nothing else
    assert len(server.asked) == 4


def test_a_server_that_refuses_or_is_gone_ends_it(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    file = write(folder / "all.jsonl", answers(["fine", "forbidden"]))
    judge = ("--judge", server.url, "--judge-model", "judge", "--retries", 0)
    keyed = (*judge, "--api-key-env", "SOME_KEY", "--concurrency", 1)
    result = evaluate(file, *keyed, status=2)
    assert "answers HTTP 401" in result.stderr
    assert "--api-key-env" in result.stderr
    assert server.keys == {"Bearer secret"}
    assert "secret" not in result.stderr
    assert [line["verdict"] for line in journal(folder)] in (["A"], ["B"])  # it is kept
    monkeypatch.setattr(run, "HOPELESS", 3)
    file = write(folder / "more.jsonl", answers([f"broken {k}" for k in range(50)]))
    result = evaluate(file, *judge, "--concurrency", 2, status=2)
    assert "3 questions in a row got no answer" in result.stderr
    assert len(server.asked) < 10


def start(folder: Path, server: Server, file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from cme_reward.cli.app import main; main()", "evaluate"]
    command += [str(file), "--judge", server.url, "--judge-model", "judge", "--concurrency", "4"]
    env = os.environ | {"PYTHONPATH": str(Path(cme_reward.__file__).parents[1])}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_nothing_twice(server: Server, folder: Path) -> None:
    """Of a judge that also misbehaves: but for what it had not answered, of each once."""
    kinds = [("fine", "busy", "nonsense", "refuse")[k % 4] for k in range(58)] + ["hang"] * 2
    file = write(folder / "all.jsonl", answers([f"{kind} {k}" for k, kind in enumerate(kinds)]))
    server.at_first = 25
    judgments = folder / "evaluation" / "judgments.jsonl"
    with start(folder, server, file) as process:
        until(lambda: server.asked.total() == 25 + 4)
        until(lambda: judgments.is_file() and judgments.read_text().count("\n") == server.answered)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = journal(folder)
    assert 15 < len(before) == server.answered
    server.more.set()
    with judgments.open("a") as file_of_judgments:
        file_of_judgments.write('{"key": "abc", "verdi')  # torn
    judge = ("--judge", server.url, "--judge-model", "judge", "--concurrency", 4)
    evaluate(file, *judge, "--timeout", 0.5, "--retries", 1, status=1)
    after = journal(folder)
    assert after[: len(before)] == before
    assert len(after) == len({line["key"] for line in after}) == 60
    assert len(server.asked) == 60
    # Neither a 429 nor silence is an answer: what met one is asked twice anyway.
    retried = {text: "busy" in text or "hang" in text for text in server.asked}
    again = {text: n - 1 - retried[text] for text, n in server.asked.items()}
    assert sum(n == 1 for n in again.values()) <= 4  # those under way when it was killed
    assert max(again.values()) <= 1
    (row,) = found(folder)["results"]
    assert (row["wins"], row["ties"], row["losses"]) == (30, 0, 0)
    assert (row["unreadable"], row["failed"]) == (28, 2)


@pytest.mark.slow
def test_what_is_under_way_at_ctrl_c_is_kept(server: Server, folder: Path) -> None:
    file = write(folder / "all.jsonl", answers([f"prompt {k}" for k in range(60)]))
    server.at_first = 6
    with start(folder, server, file) as process:
        assert process.stderr is not None
        until(lambda: server.asked.total() == 6 + 4)
        process.send_signal(signal.SIGINT)
        shown = ""
        while "waiting for the answers under way" not in shown:
            piece = process.stderr.read(1)
            assert piece, shown  # it ended
            shown += piece
        server.more.set()
        shown += process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, shown
    assert len(journal(folder)) == server.answered == server.asked.total() == 6 + 4


def test_stored_preferences_need_no_judge(folder: Path) -> None:
    rows = answers(list("abcd"))
    for row, p in zip(rows[1::2], (1, 0.5, 0.25, None), strict=True):
        row["meta"] = {"prefs": {"gpt": p if p is None else {"vs": "old", "p_win": p}}}
    file = write(folder / "all.jsonl", rows)
    evaluate(file, "--preferences", "meta.prefs.gpt")
    (row,) = found(folder)["results"]
    assert (row["wins"], row["ties"], row["losses"]) == (1, 1, 1)
    assert row["win_rate"][0] == pytest.approx(1.75 / 3, abs=1e-6)
    evaluate(file, "--preferences", "meta.prefs.gpt", "--against", "new")
    assert found(folder)["results"][0]["win_rate"][0] == pytest.approx(1.25 / 3, abs=1e-6)
    annotated = [
        {"instruction": str(k), "output_1": "poor", "generator_1": "old", "output_2": "good",
         "generator_2": "new", "preference": p}
        for k, p in enumerate((2, 1.5, 0, 1, None))
    ]  # fmt: skip
    evaluate(write(folder / "annotations.jsonl", annotated), "--preferences", "preference")
    (row,) = found(folder)["results"]
    assert (row["baseline"], row["wins"], row["ties"], row["losses"]) == ("old", 1, 2, 1)
    result = evaluate(file, "--preferences", "meta.prefs.gpd", status=2)
    assert "--preferences meta.prefs.gpd: no line has a value" in result.stderr
    for row in rows:
        row["meta"] = {"prefs": {"gpt": {"vs": "another", "p_win": 1}}}
    result = evaluate(write(file, rows), "--preferences", "meta.prefs.gpt", status=2)
    assert "no line has a preference 'meta.prefs.gpt' between old and" in result.stderr


@pytest.mark.skipif(SHARED is None, reason="needs the texts of CME_SHARED")
def test_alpaca_evals_preferences_give_about_the_rates_of_its_leaderboard(folder: Path) -> None:
    """There of 805 prompts, here of 110 of them: the intervals hold the published rates."""
    models = ["FuseChat-Gemma-2-9B-Instruct", "claude-2.1", "gemma-7b-it", "NullModel"]
    rows = [row for row in shared_rows("dev_alpacaeval")
            if row["model"] in ("gpt4_1106_preview", *models)]  # fmt: skip
    file = write(folder / "all.jsonl", rows)
    evaluate(file, "--preferences", "meta.prefs.weighted_alpaca_eval_gpt4_turbo")
    published = {row["model"]: row["meta"] for row in rows}
    results = found(folder)["results"]
    assert {row["model"] for row in results} == set(models)
    for row in results:
        of = published[row["model"]]
        for (_, low, high), name in (
            (row["win_rate"], "lb_win_rate"),
            (row["length_controlled_win_rate"], "lb_lc_win_rate"),
        ):
            assert low - 0.02 < of[name] / 100 < high + 0.02, (row, name)
        wins = [r["meta"]["prefs"]["weighted_alpaca_eval_gpt4_turbo"] for r in rows
                if r["model"] == row["model"]]  # fmt: skip
        by_hand = statistics.fmean(p["p_win"] for p in wins if p is not None)
        assert row["win_rate"][0] == pytest.approx(by_hand, abs=1e-6)


def test_wrong_input_is_named(folder: Path) -> None:
    rows = [*answers(["a"]), {"prompt": "a", "response": "other", "model": "new"}]
    rows += [{"prompt": "a"}, {"prompt": "a", "response": "x", "model": 3}]
    file = write(folder / "all.jsonl", rows)
    judge = ("--judge", "python:some_judges:longer")
    result = evaluate(file, *judge, status=1)
    errors = " ".join(result.stderr.split())
    assert "line 3: is a second response of new" in errors
    assert "line 4: response is null; expected text" in errors
    assert "line 5: model is 3" in errors
    risk = "--abstain-risk", 0.1, "--label", "good"
    rows[0]["one"] = True  # a label of one response tells no better one
    write(file, rows)
    for args, said in (
        ((), "expected either --judge SPEC"),
        ((*judge, "--abstain-above", 0.5), "needs --both-orders"),
        ((*judge, "--abstain-risk", 0.1), "--abstain-risk SHARE and --label FIELD need each"),
        ((*judge, "--both-orders", *risk), "--label good: no line has a value in the field"),
        ((*judge, "--both-orders", *risk[:3], "one"), "of no pair it tells the better response"),
        ((*judge, "--abstain-risk", 1, "--label", "good"), "expected a share, such as 0.1"),
        ((*judge, *judge), "two judges are the same"),
        ((*judge, "--against", "nil"), "--against 'nil' is no model"),
        (("--judge", "gpt-4"), "'gpt-4' is no judge; expected http://host/v1"),
        (("--judge", "http://", "--judge-model", "x"), "names no host"),
        (("--judge", "http://x/v1"), "needs --judge-model NAME"),
        (("--judge", "python:some_judges:nil"), "has no attribute 'nil'"),
        (("--judge", "python:some_judges"), "expected python:module:function"),
        ((*judge, "--price-in", 1, "--price-in", 2), "--price-in is given 2 times"),
    ):
        assert said in " ".join(evaluate(file, *args, status=2).stderr.split())
    with (folder / "evaluation" / "judgments.jsonl").open("a") as stream:
        stream.write("what?\n")
    result = evaluate(file, *judge, status=2)
    assert "is no judgment: b'what?'" in " ".join(result.stderr.split())
