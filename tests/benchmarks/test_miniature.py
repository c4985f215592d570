"""The miniature of the paper: its judge, that it is the same in every run, and its smallest run."""

from __future__ import annotations

import hashlib
import json
import random
import re
from argparse import Namespace
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl_tiny import tokenizer as other_tokenizer

from benchmarks.grpo import Settings, divergence, train
from benchmarks.miniature import decide, evaluate, grammar, models, rewards, ship, tasks, vocabulary
from benchmarks.miniature.__main__ import SMALL, jobs_of, main
from benchmarks.miniature.candidates import (
    Candidate,
    centred,
    earliness,
    most_different,
    next_prompts,
    shortened,
    soft_minimum,
)
from benchmarks.miniature.cast import Cast, flawed, question_about, slip, with_verdicts
from benchmarks.miniature.conditions import CONDITIONS, GROUPS
from benchmarks.miniature.demo import main as main_of_demo
from benchmarks.miniature.environment import Tasks
from benchmarks.miniature.models import EOS, Size
from benchmarks.miniature.runs import World, file_of, run
from benchmarks.miniature.sampling import sample
from cme_reward import SpanTable

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "response", "mark"),
    [
        ("reverse: bad\n", "dab", 1),
        ("reverse: bad\n", "dba", 0),
        ("reverse: bad\n", "dab...", 0),
        ("sort: dbca\n", "abcd", 1),
        ("sort: dbca\n", "dcba", 0),
        ("add: 37+48\n", "85", 1),
        ("add: 37+48\n", "75", 0),
        ("add: 37+48\n", "085", 0),
        ("sort, reverse: cab\n", "abc cba", 1),
        ("sort, reverse: cab\n", "abc cab", 0),
        ("say: old dog\n", "the old dog runs.", 1),
        ("say: old dog\n", "the old dog runs near the shy children.", 1),
        ("say: old dog\n", "the old dog run near the shy children.", 0.5),
        ("say: old children\n", "the old children run.", 1),
        ("say: old dog\n", "the old dog runs near the shy children", 0),
        ("say: old dog\n", "the old cat runs.", 0),
        ("say: old dog\n", "the old dog runs near near the cat.", 0),
        ("say: old dog\n", "the old dog runs near the.", 0),
        ("say: old dog\n", "the old dog runs near the shy old cat.", 0),
        ("say: old dog\n", "the old dog .", 0),
        ("say: old dog\n", "", 0),
        ("total: 13+9+4\n", "13+9=22 22+4=26", 1),
        ("total: 13+9+4\n", "13+9=22", 0),
        ("total: 13+9+4\n", "13+9=12 12+4=16", 0),
        ("total: 13+9+4\n", "26", 0),
        ("insert: c a b\n", "c=c a=ac b=abc", 1),
        ("insert: c a b\n", "c=c a=ca b=cba", 0),
        ("insert: c a b\n", "abc", 0),
        ("tell: 2 old dog\n", "the old dog runs. the old dog sings.", 1),
        ("tell: 2 old dog\n", "the old dog runs. the old dog runs.", 0),
        ("tell: 2 old dog\n", "the old dog runs.", 0),
        ("tell: 2 old dog\n", "the old dog runs. the old dog sings. the old dog waits.", 0),
        ("tell: 2 old dog\n", "the old dog runs. the old dog sing.", 0.5),
        ("tell: 2 old dog\n", "the old dog runs. the old dog sings", 0),
    ],
)
def test_the_judge(prompt: str, response: str, mark: float) -> None:
    assert tasks.grade(prompt, response) == mark


@pytest.mark.parametrize("half", tasks.HALVES)
def test_answers_are_right_and_mistakes_are_not(half: str) -> None:
    seen = Counter()
    for example in islice(tasks.stream(7, tasks.HALVES[half]), 2000):
        assert tasks.grade(example.prompt, example.answer) == 1
        if example.mistake != example.answer:
            assert tasks.grade(example.prompt, example.mistake) < 1
            seen[example.task] += 1
    # The wrong belief makes a difference in every task.
    assert set(seen) == set(tasks.HALVES[half])
    assert min(seen.values()) > 100


def test_long_answers_are_long_in_either_vocabulary() -> None:
    examples = tasks.held_out_set(60, tasks=tasks.HALVES["long"])
    size = {}
    for tokenizer in (vocabulary.generator_tokenizer(), vocabulary.verifier_tokenizer()):
        rows = tokenizer([e.answer for e in examples])["input_ids"]
        size[tokenizer.name_or_path] = sorted(map(len, rows))
    assert size["miniature-generator"][len(examples) // 10] >= 50
    assert size["miniature-generator"][-1] < tasks.MAX_NEW["long"]
    assert size["miniature-verifier"][0] >= 25


def test_mistakes_by_hand() -> None:
    assert tasks.reverse_wrongly("abcd") == "dcab"
    assert tasks.sort_wrongly("cab") == "cba"
    assert tasks.add_wrongly(37, 48) == 75
    assert tasks.add_wrongly(12, 34) == 46


def test_held_out_prompts_are_in_no_training_text() -> None:
    held = {e.prompt for e in tasks.held_out_set(100)}
    assert len(held) == 100
    trained = [p for seed in (1000, 6000) for p, _ in islice(flawed(seed), 2000)]
    trained += [p for p, _ in islice(with_verdicts(6000), 2000)]
    assert not held & set(trained)
    assert not any(tasks.is_held_out(f"{line}\n") for p in trained for line in p.split("\n")[:1])


def test_everything_is_the_same_in_every_run() -> None:
    assert list(islice(tasks.stream(3), 50)) == list(islice(tasks.stream(3), 50))
    for build in (vocabulary.generator_tokenizer, vocabulary.verifier_tokenizer):
        again = build.__wrapped__()
        assert again.backend_tokenizer.to_str() == build().backend_tokenizer.to_str()
    # By hand: of "aab" x 2 and "ab" the pair a-b is in all three words, then a-ab in two.
    assert vocabulary.learn_merges(Counter({"aab": 2, "ab": 1}), 2) == [("a", "b"), ("a", "ab")]
    # Equally frequent: the first in the alphabet.
    assert vocabulary.learn_merges(Counter({"ba": 1, "ab": 1}), 1) == [("a", "b")]


def test_tokenizers_differ_and_keep_the_text() -> None:
    generator, verifier = vocabulary.generator_tokenizer(), vocabulary.verifier_tokenizer()
    texts = [e.prompt + e.answer for e in islice(tasks.stream(5), 200)]
    differ = 0
    for text in texts:
        spans = []
        for tokenizer in (generator, verifier):
            table = SpanTable(tokenizer)
            ids, ends = table.encode(text)
            assert table.decode(ids)[0] == text
            spans.append(ends.tolist())
        differ += spans[0] != spans[1]
    assert differ > 0.9 * len(texts)


def test_a_slip_changes_one_thing() -> None:
    rng = random.Random(0)
    for example in islice(tasks.stream(2), 200):
        slipped = slip(example.answer, rng)
        assert abs(len(slipped) - len(example.answer)) <= 1
    text, verdict = next(t for t in with_verdicts(1) if t[1] in ("Yes", "No"))
    prompt, response = text.split("\n")[:2]
    assert text == question_about(f"{prompt}\n", response)
    assert verdict == ("Yes" if tasks.grade(f"{prompt}\n", response) == 1 else "No")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sampling_equals_generate(kind: str) -> None:
    tokenizer = vocabulary.generator_tokenizer()
    model = models.build(kind, Size(32, 2), len(tokenizer), seed=1)
    for name, weights in model.named_parameters():
        if weights.ndim > 1:
            weights.data *= 8  # so that rows differ, and some stop
        elif "q_norm" in name:
            weights.data *= torch.linspace(0.5, 2, len(weights))
    model.eval()
    prompts = tokenizer([e.prompt for e in tasks.held_out_set(20)])["input_ids"]
    ours = sample(model, prompts, max_new=12)
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert row == out[0, len(prompt) :].tolist()
    drawn = [sample(model, prompts, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_win_rate() -> None:
    # One win, one loss, two ties: (1 + 2 / 2) / 4.
    assert evaluate.win_rate([1, 0, 1, 0.5], [0.5, 1, 1, 0.5]) == 0.5
    assert evaluate.win_rate([1, 1], [0, 1]) == 0.75
    with pytest.raises(ValueError, match="2 grades against 1"):
        evaluate.win_rate([1, 1], [0])


def test_interval() -> None:
    # Mean 2, deviation 1, three seeds: 4.303 / sqrt(3).
    assert evaluate.interval([1, 2, 3]) == pytest.approx((2, 2.4841), abs=1e-4)
    # Of eleven numbers 0 to 10: deviation sqrt(11) over sqrt(11), t 2.2281 with ten degrees.
    assert evaluate.interval(range(11)) == pytest.approx((5, 2.2281), abs=1e-4)
    assert evaluate.quantile(0.975, 5) == pytest.approx(2.5706, abs=1e-4)
    assert evaluate.interval([2])[1] != evaluate.interval([2])[1]


def test_a_response_that_never_stops_is_wrong() -> None:
    tokenizer = vocabulary.generator_tokenizer()
    example = next(tasks.stream(0, ("sort",)))
    ids = tokenizer(example.answer)["input_ids"]
    assert evaluate.grades(tokenizer, [example] * 2, [[*ids, EOS], ids]) == [1, 0]


def test_models_are_trained_once_and_the_same_again(tmp_path: Path) -> None:
    first = Cast(tmp_path / "a", SMALL).model("pretrained", 1).state_dict()
    kept = Cast(tmp_path / "a", SMALL).model("pretrained", 1).state_dict()
    again = Cast(tmp_path / "b", SMALL).model("pretrained", 1).state_dict()
    other = Cast(tmp_path / "b", SMALL).model("pretrained", 2).state_dict()
    for name, weights in first.items():
        assert torch.equal(weights, kept[name])
        assert torch.equal(weights, again[name])
    assert any(not torch.equal(weights, other[name]) for name, weights in first.items())


def test_candidates_by_hand() -> None:
    class Fixed:
        name, tokenizer, max_length, vocab_size = "fixed", None, 100, 9

        def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
            # Half as likely after the prompt's first token alone.
            return [np.log(np.array([0.5, 0.04]) / (2 if len(p) == 1 else 1)) for p in prompts]

    asked = ([[1, 2, 3]], [[4, 5]])
    (power,) = Candidate(power=0.5).verifier(Fixed()).logprobs(*asked)
    assert power == pytest.approx([2 * (0.5**0.5 - 1), 2 * (0.2 - 1)])  # (p^0.5 - 1) / 0.5
    (contrast,) = Candidate(contrast=0.5).verifier(Fixed()).logprobs(*asked)
    # log p - (log p - log 2) / 2 = (log p + log 2) / 2.
    assert contrast == pytest.approx([0.0, np.log(0.08) / 2])
    fixed = Fixed()
    assert Candidate().verifier(fixed) is fixed
    # Astray, each response is read after the next other prompt of the batch.
    assert next_prompts([[1, 2], [1, 2], [3], [4]]) == [(3,), (3,), (4,), (1, 2)]
    (read,) = Candidate(astray=True).verifier(fixed).logprobs([[1, 2], [3]], [[4, 5]] * 2)[:1]
    assert read == pytest.approx(np.log([0.25, 0.02]))  # after [3], a prompt of one token
    with pytest.raises(ValueError, match="1 different prompts"):
        next_prompts([[1], [1]])


def test_several_verifiers_by_hand() -> None:
    class Fixed:
        name, tokenizer, max_length, vocab_size = "fixed", None, 100, 9

        def __init__(self, *logp: float) -> None:
            self.logp = np.array(logp)

        def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
            return [self.logp for _ in prompts]

    strong, other = Fixed(-1.0, -4.0), Fixed(-3.0, -4.0)
    for change, expected in (
        (Candidate(spread=0.0), [-2.0, -4.0]),
        (Candidate(spread=1.5), [-3.5, -4.0]),  # deviations 1 and 0
        (Candidate(minus=0.5), [0.5, -2.0]),
    ):
        found = change.verifier(strong, [other]).logprobs([[1]], [[2, 3]])
        assert found[0] == pytest.approx(expected)


def test_centred_rewards_by_hand() -> None:
    batch: Any = SimpleNamespace(
        token_rewards=torch.tensor([[-1.0, -3, 0], [-8, 0, 0], [-5, -7, 0]]),
        mask=torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool(),
    )
    # Of the first group's three tokens the mean is -4, of the second's -6.
    expected = [[3, 1, 0], [-4, 0, 0], [1, -1, 0]]
    assert centred(batch, [0, 0, 1]).tolist() == expected
    nothing: Any = SimpleNamespace(token_rewards=torch.zeros(1, 2), mask=torch.zeros(1, 2).bool())
    assert centred(nothing, [0]).tolist() == [[0, 0]]


def test_weights_of_tokens_prompts_and_lengths_by_hand() -> None:
    rewards_BT = torch.tensor([[-1.0, 3, 0, -4], [0, 0, 0, 0]])
    # 1, 4, 4 and 8 of 8 nats have passed.
    expected = [[1 + 7 / 16, 1 + 4 / 16, 1 + 4 / 16, 1], [1, 1, 1, 1]]
    assert earliness(rewards_BT, 0.5).tolist() == expected
    sequence_B = torch.tensor([-1.0, -2, -1, -5, -3, -3])
    kept = most_different(sequence_B, [0, 0, 1, 1, 2, 2], 0.5)  # round(1.5) = 2 of three
    assert kept.tolist() == [True, True, True, True, False, False]
    fewest = most_different(sequence_B, [0, 0, 1, 1, 2, 2], 0.1)
    assert fewest.nonzero()[:, 0].tolist() == [2, 3]  # one prompt at least
    batch: Any = SimpleNamespace(
        sequence_rewards=torch.log(torch.tensor([0.5, 0.5, 0.8])),
        sampled=torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool(),
    )
    # Lengths 1 and 3, their mean 2; a response of nothing is not made longer.
    found = shortened(batch, [0, 0, 1], 1.0)
    assert found.tolist() == pytest.approx([0.5 / 1.5, 0.5 / 2.5, 0.8])


def test_the_oracle_knows_the_grades() -> None:
    tokenizer = vocabulary.generator_tokenizer()
    texts = ("13+9=22 22+4=26", "13+9=22")
    ids = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
    found = rewards.marked(tokenizer, ["total: 13+9+4\n"] * 2, [[5], [5]], ids, [0, 0])
    assert found.shape == (2, len(ids[0]))
    # Grades 1 and 0: mean 0.5, sample deviation 0.7071, eps 0.1.
    assert found[:, 0].tolist() == pytest.approx([0.5 / 0.80711, -0.5 / 0.80711], abs=1e-4)


def test_the_divergence_is_grpos() -> None:
    own, anchor = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.5, 0.4]))
    # q / p = 2: 2 - log 2 - 1.
    assert divergence(own, anchor).tolist() == pytest.approx([0, 1 - np.log(2)])


def test_an_anchor_holds_the_policy(tmp_path: Path) -> None:
    world = World(tmp_path, SMALL, questions=6, long_scale=SMALL)
    start = world.cast("long").model("pretrained", 0).state_dict()
    plain = CONDITIONS["harder: sequence"]

    def distance(kl: float) -> float:
        policy = world.cast("long").model("pretrained", 0)
        settings = Settings(steps=6, prompts=2, rollouts=4, lr=3e-3, warmup=1, kl=kl)
        give = rewards.advantages(plain, world.cast("long"), policy)
        tokenizer = world.cast("long").tokenizer("pretrained")
        train(policy, Tasks(tokenizer, world.test("long"), 0, "long"), give, settings, 0)
        return sum(float((a - start[n]).norm()) for n, a in policy.state_dict().items())

    assert distance(10.0) < 0.9 * distance(0.0)


def test_the_soft_minimum_lies_between_the_worst_token_and_the_mean() -> None:
    logp = np.array([-1.0, -9.0])
    soft = soft_minimum(logp, 1.0)
    # -log((e^1 + e^9) / 2) = -(9 + log(1 + e^-8) - log 2).
    assert soft == pytest.approx(-9 - np.log1p(np.exp(-8)) + np.log(2), abs=1e-5)
    assert -9 < soft < -5
    assert soft_minimum(logp, 1e6) == pytest.approx(-5, abs=1e-3)
    batch: Any = SimpleNamespace(
        verifier_tokens=[(np.array([1, 2]), logp), (np.zeros(0), np.zeros(0))],
        sequence_rewards=torch.tensor([-5.0, -3.0]),
    )
    assert Candidate(worst=1.0)._softly_worst(batch).tolist() == pytest.approx([soft, -3.0])


def test_decisions_are_paired_and_corrected(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "runs").mkdir()
    ends = {"token": (0.5, 0.6, 0.7), "sequence": (0.6, 0.7, 0.801), "return": (0.5, 0.6, 0.7)}
    for name, accuracies in ends.items():
        for seed, last in enumerate(accuracies):
            points = [(0, 0.2), (50, 0.9), (100, last)]
            curve = [{"step": s, "accuracy": a} for s, a in points]
            file = file_of(world, f"horizon: {name}", seed)
            file.write_text(json.dumps({"seed": seed, "curve": curve}))
    better, same, worse = decide.decisions(world, "horizon")
    assert (better.ours, better.theirs, better.seeds) == ("sequence", "token", 3)
    # Differences 0.1, 0.1, 0.101: mean 0.100333, deviation 0.00057735 over sqrt(3). Of twelve
    # comparisons, t with two degrees of freedom for 1 - 0.05 / 24 is 15.443.
    assert better.end == pytest.approx((0.100333, 15.443 * 0.00057735 / 3**0.5), abs=1e-4)
    assert better.verdict == "better"
    assert (same.end, same.verdict) == ((0.0, 0.0), "no difference")
    assert worse.verdict == "worse"
    assert better.drift[0] == pytest.approx(-0.100333, abs=1e-5)
    # Trapezia: the second half's mean is (0.9 + end) / 2, and counts a half.
    assert better.area[0] == pytest.approx(0.100333 / 4, abs=1e-5)


def test_conditions_are_named_once_and_known() -> None:
    assert len(CONDITIONS) == sum(map(len, GROUPS.values()))
    for group, pairs in decide.PAIRS.items():
        assert {f"{group}: {name}" for pair in pairs for name in pair} <= set(CONDITIONS)
    assert other_tokenizer().get_vocab() != vocabulary.generator_tokenizer().get_vocab()


def test_the_study_is_every_condition_with_the_seeds_it_needs() -> None:
    given = Namespace(group=None, only=None, seeds=None, study=True)
    seeds = Counter(condition.name for condition, _ in jobs_of(given))
    assert set(seeds) == set(CONDITIONS)
    assert seeds["claims: token"] == 24
    assert seeds["horizon: return"] == 11
    given.study = False
    short = Counter(condition.name for condition, _ in jobs_of(given))
    assert not any(name.startswith(tuple(decide.PAIRS)) for name in short)
    assert set(short.values()) == {3}
    given.seeds, given.group, given.only = 2, ["claims"], ["claims: token"]
    assert [(c.name, seed) for c, seed in jobs_of(given)] == [
        ("claims: token", 0),
        ("claims: token", 1),
    ]


def test_the_smallest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process, two seeds: runs, is not run again, and says what holds."""
    arguments = ["--smoke", "--out", str(tmp_path), "--workers", "0", "--seeds", "2"]
    arguments += ["--only", "CME, tok", "--group", "rewards"]
    main(arguments)
    files = sorted((tmp_path / "runs").glob("CME*.json"))
    assert len(files) == 6  # token, with baseline, in TRL
    result = json.loads(files[0].read_text())
    assert [point["step"] for point in result["curve"]] == [0, 2]
    stamps = [file.stat().st_mtime_ns for file in files]
    main(arguments)
    assert stamps == [file.stat().st_mtime_ns for file in files]
    report = (tmp_path / "report.md").read_text()
    assert "| CME, token | 2 |" in report
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert json.loads((tmp_path / "report.json").read_text())["seeds"] == [0, 1]
    assert (tmp_path / "pictures" / "rewards.png").read_bytes()[:4] == b"\x89PNG"


def test_long_answers_in_the_smallest_run(tmp_path: Path) -> None:
    """Their cast is their own; ensembles and weaker verifiers are of it; decided by samples."""
    world = ["--smoke", "--out", str(tmp_path), "--workers", "0", "--seeds", "2"]
    only = ("harder: sequence", "three verifiers", "minus half")
    main([*world, "--group", "harder", *(x for name in only for x in ("--only", name))])
    models_ = {file.name for file in (tmp_path / "models-long").iterdir()}
    assert models_ >= {f"verifier-3-{seed}.safetensors" for seed in range(3)}
    assert "verifier-2-0.safetensors" in models_
    assert not (tmp_path / "models").exists()
    found = json.loads((tmp_path / "report.json").read_text())
    assert "total" in found["rows"]["harder: sequence"]["tasks"]
    assert found["rows"]["base, long answers"]["sampled"][0] == 0
    assert found["decisions"]["harder"][0]["seeds"] == 2


def test_grammar_knows_its_own_sentences() -> None:
    rng = random.Random(1)
    for _ in range(500):
        about = grammar.topic(rng)
        assert grammar.grade(about, grammar.sentence(about, rng)) == 1
        assert grammar.grade(about, grammar.sentence(about, rng, agree=False)) == 0.5


def test_settings_are_the_papers() -> None:
    assert Settings().rollouts == 8
    assert Settings().warmup == 20


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = Settings(steps=2, prompts=2, rollouts=4)
    main_of_demo(tmp_path, Cast(tmp_path / "models", SMALL), few, questions=5)
    said = capsys.readouterr().out
    assert "checked by a program" in " ".join(said.split())
    assert "step 2" in said
    assert "2/2" in said  # the progress bar's last word
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "before-after.html").read_text()
    assert "before:" in page
    assert "after:" in page


def test_the_demos_models_are_the_files_of_their_card() -> None:
    files = sorted(ship.FOLDER.glob("*.safetensors"))
    assert [file.name for file in files] == [f"{name}-0.safetensors" for name in ship.NAMES]
    assert sum(file.stat().st_size for file in files) < 1_500_000
    sums = (ship.FOLDER / "SHA256SUMS").read_text()
    card = (ship.FOLDER / "README.md").read_text()
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"{digest}  {file.name}\n" in sums
        (row,) = re.findall(rf"^\| `{file.name}` .*$", card, re.MULTILINE)
        assert digest in row
        assert f"{file.stat().st_size:,}" in row


def test_the_demos_models_have_learnt_what_they_are_for() -> None:
    """The generator the mistakes, the verifier to answer rightly."""
    test, cast = tasks.held_out_set(100), Cast(ship.FOLDER)
    marks: dict[str, float] = {}
    for name in ship.NAMES:
        model, tokenizer = cast.model(name), cast.tokenizer(name)
        assert all(weights.dtype == torch.float32 for weights in model.parameters())
        ids = evaluate.answers(model, tokenizer, test)
        marks[name] = float(np.mean(evaluate.grades(tokenizer, test, ids)))
    generator, verifier = (marks[name] for name in ship.NAMES)
    assert generator < 0.5 < verifier


def test_models_are_shipped_as_a_cast_reads_them(tmp_path: Path) -> None:
    ship.ship(tmp_path / "half", SMALL)
    for name in ship.NAMES:
        half = Cast(tmp_path / "half", SMALL).model(name).state_dict()
        full = Cast(tmp_path / "full", SMALL).model(name).state_dict()
        for key, weights in full.items():
            assert torch.equal(half[key], weights.half().float())


def test_a_run_is_the_same_again(tmp_path: Path) -> None:
    few = Settings(prompts=2, rollouts=4)
    condition = CONDITIONS["CME, token"]
    curves = []
    for folder in ("a", "b"):
        world = World(tmp_path / folder, SMALL, few, questions=10, steps=0.03)
        curves.append(run(world, condition, 1)["curve"])
    assert curves[0] == curves[1]
