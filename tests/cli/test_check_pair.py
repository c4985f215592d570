"""`cme-reward check-pair`: what it finds, and what it says."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import BUILDERS, load_tokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from cme_reward.cli.app import app
from cme_reward.cli.check_pair import CUT_SHORT, EXACT, SAMPLES, PairCheck, check

LOSSLESS = ["byte-level", "bytes", "sentencepiece", "sentencepiece-dummy"]


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizers, each in a directory without weights."""
    path = tmp_path_factory.mktemp("tokenizers")
    for name in BUILDERS:
        load_tokenizer(name).save_pretrained(path / name)
    return path


@cache
def pair(generator: str, verifier: str) -> PairCheck:
    return check(load_tokenizer(generator), load_tokenizer(verifier), (generator, verifier))


def by_name(found: PairCheck) -> dict[str, Any]:
    return {sample.name: sample for sample in found.samples}


def run(*args: Any, status: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["check-pair", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize("generator", BUILDERS)
@pytest.mark.parametrize("verifier", LOSSLESS)
def test_verifiers_that_keep_every_byte_align_exactly(generator: str, verifier: str) -> None:
    found = pair(generator, verifier)
    assert all(sample.conservation_error <= EXACT for sample in found.samples)
    assert set(SAMPLES) < set(by_name(found))
    bad = [sample for sample in found.samples if not sample.exact]
    if (generator, verifier[:13]) == ("suffix", "sentencepiece"):
        # Random tokens may hold U+2581, which SentencePiece cannot tell from a space.
        assert all(r"turns '\u2581" in sample.notes[0] for sample in bad)
    else:
        assert found.exact
        assert found.verdict() == f"aligned exactly on all {len(found.samples)} samples"


def test_counts_by_hand() -> None:
    found = by_name(pair("bytes", "bytes"))
    # "a", 30 spaces, "b", 6 line breaks, 6 tabs, "c", space, U+3000 (3 bytes), space, "d":
    # 51 bytes.
    sample = found["long whitespace"]
    assert (sample.generator_tokens, sample.verifier_tokens) == (51, 51)
    assert (sample.rewarded, sample.dropped) == (1, 0)
    english = found["English"]
    n_bytes = len(SAMPLES["English"].encode())
    assert english.generator_tokens == english.verifier_tokens == n_bytes
    assert english.rewarded == 1
    # The cut: 3 of the 4 bytes of the last character are left, and not shown to the verifier.
    cut = found["cut off character"]
    whole = len(CUT_SHORT[:-1].encode())
    assert (cut.generator_tokens, cut.verifier_tokens) == (whole + 3, whole)
    assert cut.rewarded == pytest.approx(whole / (whole + 3))


def test_a_verifier_that_normalises_is_not_exact_where_it_does() -> None:
    found = pair("byte-level", "byte-level-nfc")
    bad = [sample.name for sample in found.samples if not sample.exact]
    assert bad == ["combining marks"]
    assert found.verdict() == f"not exact on 1 of {len(found.samples)} samples: combining marks"
    sample = by_name(found)["combining marks"]
    assert not sample.verifier_round_trip
    assert sample.generator_round_trip
    assert sample.notes == [r"the verifier turns 'e\u0301 cre' into '\xe9 cr\xe8m'"]
    # The other way round the tokens write normalised text, which is aligned exactly.
    other = by_name(pair("byte-level-nfc", "byte-level"))["combining marks"]
    assert other.exact
    assert not other.generator_round_trip
    assert other.notes == [r"the generator turns 'e\u0301 cre' into '\xe9 cr\xe8m'"]


def test_a_verifier_that_loses_text_is_not_exact() -> None:
    found = pair("byte-level", "wordpiece")
    assert not found.exact
    assert by_name(found)["English"].notes == ["the verifier turns 'She so' into 'she so'"]
    assert not by_name(found)["Chinese"].verifier_round_trip
    assert found.verdict().endswith("English, code, tabs, code, spaces, mathematics and 21 more")


def test_one_family_is_recognised() -> None:
    same = pair("byte-level", "byte-level")
    assert same.exact
    assert same.same_family
    assert same.shared_vocabulary == 1
    assert same.identical_tokens
    assert "same tokenizer family (100% of the vocabulary" in same.warnings()[0]
    other = pair("byte-level", "sentencepiece")
    assert not other.same_family
    assert not any("family" in warning for warning in other.warnings())
    # A Jaccard index: |common| / |either|.
    ours = set(load_tokenizer("byte-level").get_vocab())
    theirs = set(load_tokenizer("sentencepiece").get_vocab())
    common = len(ours & theirs)
    assert other.shared_vocabulary == common / (len(ours) + len(theirs) - common)


def test_templates_and_special_tokens() -> None:
    found = pair("byte-level", "sentencepiece")
    ours, theirs = found.generator, found.verifier
    assert (ours.eos, ours.end_of_turn, ours.bos) == ("<|im_end|>", "<|im_end|>", None)
    assert ours.generation_prompt == "<|im_start|>assistant\n"
    assert ours.system_role == "yes"
    assert ours.kind == "byte-level BPE"
    assert ours.vocabulary == len(load_tokenizer("byte-level"))
    assert (theirs.chat_template, theirs.end_of_turn, theirs.bos) == (False, "</s>", "<s>")
    assert (theirs.generation_prompt, theirs.system_role) == ("", "")
    assert theirs.kind == "SentencePiece BPE with byte fallback, normaliser Replace"
    assert any("no chat template" in warning for warning in found.warnings())
    assert any(
        "generator has no token that ends a response" in warning
        for warning in pair("wordpiece", "bytes").warnings()
    )


def test_a_template_without_a_system_role() -> None:
    tokenizer = load_tokenizer("byte-level").__class__(
        tokenizer_object=load_tokenizer("byte-level").backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template="{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
    )
    found = check(load_tokenizer("bytes"), tokenizer, ("g", "v"))
    assert found.exact
    assert found.verifier.system_role == "no"
    assert any("no system role" in warning for warning in found.warnings())


def test_the_screen(folder: Path) -> None:
    result = run(folder / "byte-level", folder / "sentencepiece")
    for name in (*SAMPLES, "cut off character", "random tokens 1"):
        assert name in result.stdout
    assert result.stdout.rstrip().endswith("aligned exactly on all 25 samples")
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""
    inexact = run(folder / "byte-level", folder / "byte-level-nfc", status=1)
    assert "not exact on 1 of 25 samples: combining marks" in inexact.stdout.replace("\n", " ")


def test_json(folder: Path) -> None:
    result = run(folder / "byte-level", f"hf:{folder / 'sentencepiece'}", "--json")
    found = json.loads(result.stdout)
    assert found["exact"] is True
    assert found["same_family"] is False
    assert found["generator"]["end_of_turn"] == "<|im_end|>"
    assert {sample["name"] for sample in found["samples"]} > set(SAMPLES)
    assert all(math.isfinite(sample["dropped"]) for sample in found["samples"])


def test_the_embedded_verifier(folder: Path) -> None:
    found = json.loads(run(folder / "byte-level", "embedded", "--json").stdout)
    assert found["exact"] is True
    assert found["verifier"]["chat_template"] is True


@pytest.mark.parametrize(
    ("verifier", "reason"),
    [
        ("no/such/place", "cannot load the tokenizer 'no/such/place'"),
        ("hf:a+hf:b", "'hf:a+hf:b' names several verifiers; expected one"),
    ],
)
def test_errors(verifier: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(folder / "bytes", verifier, status=2)
    assert result.stderr.startswith(f"error: {reason}")
    assert result.stdout == ""


@pytest.mark.slow
def test_real_tokenizers(shared: Path | None, folder: Path) -> None:
    if shared is None:  # stand-ins of the same two kinds
        first, second = folder / "byte-level-nfc", folder / "sentencepiece"
    else:
        first, second = (shared / "tokenizers" / name for name in ("qwen2.5", "gemma3"))
    assert "aligned exactly" in run(first, second).stdout
