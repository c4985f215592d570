"""`cme-reward rank --reward`: other rewards of the package beside cross-model entropy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cme_reward import CMEConfig, CrossModelEntropy, TransformersVerifier, load_verifier
from cme_reward.cli.app import app
from cme_reward.comparators import load_reward, policy_statistics
from cme_reward.comparators.policy import PolicyStatistics
from cme_reward.conversation.format import PromptFormat

EMBEDDED = Path(load_verifier.__code__.co_filename).parent / "embedded"
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?", "response": "2 + 2 = 4", "right": True},
    {"prompt": "Say hello.", "response": "Hello, hello! Hello, hello! Hello, hello!", "right": 1},
    {"prompt": "What is 2 + 2?", "response": "It is 7, is it?", "right": False},
    {"prompt": "Say hello.", "response": "", "right": False},
    {"prompt": "What is 2 + 2?", "response": "That makes 4.", "right": True},
    {"prompt": [{"role": "user", "content": "Say hello."}], "response": "Hi", "right": True},
]


@pytest.fixture(scope="module")
def policy() -> Any:
    return TransformersVerifier.from_pretrained(str(EMBEDDED))


def run(*args: Any, rows: list[Any] = ROWS, status: int = 0) -> Any:
    stdin = "".join(json.dumps(row) + "\n" for row in rows)
    result = CliRunner().invoke(app, ["rank", "-", "-q", *map(str, args)], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def scored(out: Path, *args: Any, rows: list[Any] = ROWS, status: int = 0) -> list[dict[str, Any]]:
    run(*args, "-o", out, rows=rows, status=status)
    return [json.loads(line)["scores"] for line in out.read_text().splitlines()]


def rewards(*names: str) -> list[str]:
    return [word for name in names for word in ("--reward", name)]


def written(policy: Any, rows: list[Any] = ROWS) -> tuple[CrossModelEntropy, list[Any], list[Any]]:
    """The reward, and the rows' prompts and ids with their ends."""
    reward = CrossModelEntropy(policy)
    ids = [
        [*reward.table.encode(row["response"])[0].tolist(), reward.generator.end_of_turn]
        for row in rows
    ]
    return reward, [row["prompt"] for row in rows], ids


def said_of(policy: Any, reward: CrossModelEntropy, prompts: list[Any], ids: list[Any]) -> Any:
    rendered = [reward.members[0].format.render(prompt) for prompt in prompts]
    return policy_statistics(policy.model, rendered, ids)


def test_scores_are_those_of_each_reward(policy: Any, tmp_path: Path) -> None:
    """With the rollouts of a prompt apart from each other, and read in batches of two."""
    names = ["rent", "em-rl-token", "em-rl-sequence", "intuitor", "ttrl", "evol-rl"]
    found = scored(
        tmp_path / "out.jsonl", "--append-eos", "--batch-size", 2, "--policy", EMBEDDED,
        *rewards(*names, "format-length longest=20 format=4", "rlme relative=true"),
    )  # fmt: skip
    reward, prompts, ids = written(policy)
    said = said_of(policy, reward, prompts, ids)
    options: dict[str, Any] = {name: {} for name in names}
    options["format-length"] = {"longest": 20, "format": "4"}
    options["rlme"] = {"relative": True}
    called = dict.fromkeys(names, "{}") | {
        "format-length": "{} longest=20 format=4",
        "rlme": "embedded: {} relative=true",
    }
    for name, given in options.items():
        other = load_reward(name, policy.tokenizer, verifier=policy, **given)
        expected = other(prompts, ids, policy_statistics=said).sequence_rewards.tolist()
        got = [scores[called[name].format(name)] for scores in found]
        assert got == pytest.approx(expected, abs=2e-5), name
        assert len(set(got)) > 1, name
    assert [scores["ttrl"] for scores in found] == [1, 1, 0, 0, 1, 1]  # messages are another prompt
    assert list(found[0])[-2:] == ["shorter wins", "less repeated wins"]
    assert next(iter(found[0])) == "embedded: mean (Eq. 3)"


def test_the_policy_reads_a_response_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counting(model: Any, prompts: Any, ids: Any) -> PolicyStatistics:
        read.append(len(ids))
        return policy_statistics(model, prompts, ids)

    monkeypatch.setattr("cme_reward.cli.rank_rewards.policy_statistics", counting)
    three = rewards("rent", "intuitor", "em-rl-sequence")
    run("--policy", EMBEDDED, *three, "--also", "baseline=policy", "--append-eos")
    assert sum(read) == len(ROWS)
    read.clear()
    run("--policy", EMBEDDED, *rewards("ttrl"))
    assert not read


def test_the_baseline_needs_no_log_probs_in_the_file(policy: Any, tmp_path: Path) -> None:
    settings = ("--set", "level=sequence", "--also", "baseline=policy")
    found = scored(tmp_path / "out.jsonl", "--append-eos", "--policy", EMBEDDED, *settings)
    reward, prompts, ids = written(policy)
    config = CMEConfig(level="sequence", baseline="policy")
    own = said_of(policy, reward, prompts, ids).logprobs
    # The verifier reads what the policy reads: nothing is left but where they tokenise apart.
    expected = CrossModelEntropy(policy, config=config)(prompts, ids, None, own).sequence_rewards
    name = "embedded, baseline=policy: mean (Eq. 3)"
    assert [s[name] for s in found] == pytest.approx(expected.tolist(), abs=2e-5)
    assert "embedded, baseline=policy: sum" not in found[0]
    assert "embedded: sum" in found[0]


def test_controls_are_other_verifiers(tmp_path: Path) -> None:
    named = scored(tmp_path / "a", *rewards("random", "self"), "--policy", EMBEDDED)
    spelt = scored(tmp_path / "b", "--verifier", f"random:{EMBEDDED}", "--verifier", "embedded")
    for one, other in zip(named, spelt, strict=True):
        assert one["random: mean (Eq. 3)"] == other["random:embedded: mean (Eq. 3)"]
        assert one["self: sum"] == pytest.approx(other["embedded: sum"], abs=1e-5)
    report = json.loads(run(*rewards("random"), "--json").stdout)
    assert report["scores"][0]["name"] == "embedded: mean (Eq. 3)"
    assert report["agreement"] == []  # of who judges, not of controls


def test_a_base_model_is_asked_for_the_end_that_its_template_writes(
    policy: Any, tmp_path: Path
) -> None:
    """Its EOS, which the verifier reads as the end of its turn, is a token it never writes."""
    folder = tmp_path / "policy"
    shutil.copytree(EMBEDDED, folder)
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert PromptFormat(tokenizer).end_of_turn == tokenizer.encode("\n")[0]
    found = scored(
        tmp_path / "out.jsonl", "--append-eos", "--policy", folder, *rewards("em-rl-sequence"),
        "--generator-tokenizer", folder, "--set", "level=sequence", "--also", "baseline=policy",
    )  # fmt: skip
    _, prompts, ids = written(policy)
    rendered = [PromptFormat(tokenizer).render(prompt) for prompt in prompts]
    newline = tokenizer.encode("\n")
    said = policy_statistics(policy.model, rendered, [[*row[:-1], *newline] for row in ids])
    assert said.logprobs is not None
    own = [float(row.sum()) for row in said.logprobs]
    assert [s["em-rl-sequence"] for s in found] == pytest.approx(own, abs=2e-5)
    config = CMEConfig(level="sequence", baseline="policy")
    cme = CrossModelEntropy(policy, tokenizer, config)
    expected = cme(prompts, ids, None, said.logprobs).sequence_rewards
    name = "embedded, baseline=policy: mean (Eq. 3)"
    assert [s[name] for s in found] == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_policy_that_is_its_own_verifier_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = TransformersVerifier.from_pretrained

    def counting(name: str, **options: Any) -> Any:
        loaded.append(name)
        return real(name, **options)

    monkeypatch.setattr(TransformersVerifier, "from_pretrained", counting)
    run("--verifier", f"random:{EMBEDDED}", *rewards("self", "rent"), "--policy", EMBEDDED)
    assert loaded.count(str(EMBEDDED)) == 1


def test_what_the_policy_cannot_read_is_a_bad_line(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "response_ids": [40, 41]},
        {"prompt": "Hi", "response_ids": [40, 99_999]},
        {"prompt": "Hi", "response_ids": [40, 42, -100], "response_mask": [1, 1, 0]},
    ]
    out = tmp_path / "out.jsonl"
    policy = ("--policy", EMBEDDED, "--padded-vocabulary", *rewards("rent"))
    result = run(*policy, "-o", out, rows=rows, status=1)
    assert "line 2: IndexError" in result.stderr
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("rnt", "--reward 'rnt': expected one of em-rl-sequence, em-rl-token, evol-rl"),
        ("cme", "cross-model entropy is there without it"),
        ("rent", "name it with --policy NAME_OR_PATH"),
        ("self", "name it with --policy NAME_OR_PATH"),
        ("random seed=1", "random has no options"),
        ("ttrl votes=2", "unknown setting --reward ttrl.votes; did you mean"),
        ("format-length longest=many", "--reward format-length.longest='many' cannot be read"),
        ("format-length longest", "--reward format-length 'longest': expected KEY=VALUE"),
        ("format-length best=3", "expected a share of the longest length"),
    ],
)
def test_wrong_rewards_are_named(asked: str, says: str) -> None:
    assert says in " ".join(run("--reward", asked, status=2).stderr.split())
