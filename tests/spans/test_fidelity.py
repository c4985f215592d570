"""Tokenizers that are not loaded as they are, and others that lose text."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engines import FakeEngine
from tokenizer_kinds import CHATML, REAL, SHARED, TEXTS, by_name, load_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cme_reward import CrossModelEntropy, SpanTable, TokenizerError, load_verifier
from cme_reward.cli.app import app
from cme_reward.cli.check_pair import Uniform, check
from cme_reward.comparators import load_reward
from cme_reward.loading import load_tokenizer as load_by_name
from cme_reward.server import run
from cme_reward.spans.fidelity import differences, load_faithful, require_faithful
from cme_reward.spans.pieces import plain_backend
from cme_reward.spans.prose import lost_prose
from cme_reward.trl.checks import check_tokenizer

# What transformers 5 makes of a byte-level vocabulary under these names: text without spaces; an
# error at every text (an [UNK] that the vocabulary lacks); an error while it is loaded; and, the
# last three, a normaliser or a regular expression of its own.
WRONG_NAMES = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GemmaTokenizerFast",
    "BertTokenizer",
    "T5TokenizerFast",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "CohereTokenizerFast",
]


def saved(folder: Path, tokenizer_class: str, kind: str = "byte-level-nfc", **more: Any) -> Path:
    """A tokenizer's folder, its configuration naming that class."""
    load_tokenizer(kind).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class} | more
    path.write_text(json.dumps(config))
    return folder


class Rebuilt(PreTrainedTokenizerFast):
    """As transformers 5 makes a LlamaTokenizer: the file's vocabulary, and its own components.

    Of its own making, so that every version of transformers has one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backend = self.backend_tokenizer
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


class Same(PreTrainedTokenizerFast):
    """Made anew without a fault; what a user does to it is the user's."""


def opened(folder: Path, kind: Callable[..., Any] = Rebuilt, **kwargs: Any) -> Any:
    tokenizer = kind(tokenizer_file=str(folder / "tokenizer.json"), **kwargs)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def changed(kind: str, change: Callable[[Tokenizer], None], **kwargs: Any) -> Any:
    """A tokenizer in memory, one of its components replaced."""
    backend = Tokenizer.from_str(load_tokenizer(kind).backend_tokenizer.to_str())
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


# Compared with the repository's own file


def test_the_damage_that_is_meant(tmp_path: Path) -> None:
    tokenizer = opened(saved(tmp_path, "LlamaTokenizerFast"))
    ids = tokenizer.encode("A one. Two", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["A", "o"]
    assert tokenizer.decode(ids) == "Aone.Two"


def test_an_object_that_loses_text_is_refused_with_the_words_and_the_remedy(tmp_path: Path) -> None:
    tokenizer = opened(saved(tmp_path, "LlamaTokenizerFast"))
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):  # OpenRLHF hands over copies
        with pytest.raises(TokenizerError) as caught:
            SpanTable(copy)
        said = str(caught.value)
        assert f"tokenizer {str(tmp_path)!r} was loaded as Rebuilt, which does not do" in said
        assert "'A one. Two' becomes 'Aone.Two'" in said
        assert "'Größe 今天 🤷🏽' becomes 'Größe'" in said
        assert f"PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r})" in said
        assert '"tokenizer_class": "PreTrainedTokenizerFast"' in said


def test_on_either_side_and_in_the_trainers_hands(tmp_path: Path) -> None:
    bad, good = opened(saved(tmp_path, "LlamaTokenizerFast")), load_tokenizer("sentencepiece")
    with pytest.raises(TokenizerError, match="was loaded as Rebuilt"):
        CrossModelEntropy(Uniform(good, "v"), bad)
    with pytest.raises(TokenizerError, match="was loaded as Rebuilt"):
        CrossModelEntropy(Uniform(bad, "v"), good)
    scorer = CrossModelEntropy(Uniform(good, "v"), load_by_name(str(tmp_path)))
    with pytest.raises(TokenizerError, match="was loaded as Rebuilt"):
        check_tokenizer(bad, scorer)  # TRL's processing class


def test_a_decoder_alone(tmp_path: Path) -> None:
    def kind(**kwargs: Any) -> Any:
        tokenizer = Same(**kwargs)
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        return tokenizer

    with pytest.raises(TokenizerError, match=r"'A one. Two' becomes 'AĠone.ĠTwo'"):
        SpanTable(opened(saved(tmp_path, "LlamaTokenizerFast"), kind))


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_what_transformers_makes_of_it(name: str, tmp_path: Path, caplog: Any) -> None:
    """Refused if text is lost, said if only tokens differ; versions make different things of it."""
    right, folder = load_tokenizer("byte-level-nfc"), saved(tmp_path, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except TypeError:
        return
    try:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        read = [tokenizer.decode(row) for row in ids]
        lost = read[:2] != TEXTS[:2]
    except Exception:
        ids, lost = [], True
    if lost:
        with pytest.raises(TokenizerError, match=r"'A one. Two' (becomes|cannot be encoded)"):
            SpanTable(tokenizer)
        return
    SpanTable(tokenizer)
    SpanTable(pickle.loads(pickle.dumps(tokenizer)))
    same = ids == [right.encode(text, add_special_tokens=False) for text in TEXTS]
    assert len(caplog.messages) == (not same)
    assert same or "makes other tokens of a text than its tokenizer.json" in caplog.text


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_by_name_it_is_what_its_file_says(name: str, tmp_path: Path, caplog: Any) -> None:
    right = load_tokenizer("byte-level-nfc")
    folder = saved(
        tmp_path, name, model_max_length=77, padding_side="left", pad_token="<|endoftext|>"
    )
    tokenizer = load_faithful(str(folder))
    for text in TEXTS:
        ids = right.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == right.decode(ids)
    SpanTable(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    assert tokenizer.chat_template == CHATML
    assert tokenizer.name_or_path == str(folder)
    told = len(caplog.messages)
    if told:  # and not made by a class that adds special tokens of its own
        assert caplog.messages[0].startswith(f"{folder}: transformers does not load")
        assert len(tokenizer) == len(right)
        assert tokenizer.all_special_ids == [right.eos_token_id, 0]
    load_faithful(str(folder))
    assert len(caplog.messages) == told, "it is said once"


def test_what_is_loaded_as_it_is_stays_as_it_is(tmp_path: Path, caplog: Any) -> None:
    tokenizer = load_faithful(str(saved(tmp_path, "PreTrainedTokenizerFast")))
    SpanTable(tokenizer)
    assert not caplog.messages


@pytest.mark.parametrize("name", by_name(REAL or ["byte-level"]))
def test_real_tokenizers_are_faithful(name: str, tmp_path: Path, caplog: Any) -> None:
    if SHARED is None:
        folder = saved(tmp_path, "PreTrainedTokenizerFast", name)
    else:
        folder = SHARED / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert differences(tokenizer) == []
    assert type(load_faithful(str(folder))) is type(tokenizer)
    assert not caplog.messages


def _normaliser(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Lowercase()


def _prefix(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)


def _limits(backend: Tokenizer) -> None:
    backend.enable_truncation(3)
    backend.enable_padding(length=99)


def _post_processor(backend: Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        "$A <|im_end|>", None, [("<|im_end|>", 2)]
    )


@pytest.mark.parametrize("change", [_normaliser, _prefix, _limits, _post_processor])
def test_what_a_user_chooses_is_not_refused(change: Any, tmp_path: Path, caplog: Any) -> None:
    tokenizer = opened(saved(tmp_path, "LlamaTokenizerFast"), Same)
    change(tokenizer.backend_tokenizer)
    SpanTable(tokenizer)
    # Other tokens than the model has learnt from are worth a word.
    assert len(caplog.messages) == (change is _normaliser)


def test_added_tokens_are_not_refused(tmp_path: Path, caplog: Any) -> None:
    tokenizer = opened(saved(tmp_path, "LlamaTokenizerFast"), Same)
    tokenizer.add_tokens(["one", AddedToken(" world"), "\n\n", "<answer>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    SpanTable(tokenizer)
    assert not caplog.messages


def test_the_legacy_flag_of_transformers_own_class_is_not_refused(
    tmp_path: Path, caplog: Any
) -> None:
    folder = saved(tmp_path, "LlamaTokenizer", "sentencepiece-dummy", unk_token="<unk>")
    for legacy in (True, False):
        SpanTable(AutoTokenizer.from_pretrained(folder, legacy=legacy))
    assert not caplog.messages


@pytest.mark.parametrize("where", ["", "nobody/nothing", "no such folder: at all", "/nowhere"])
def test_without_a_file_there_is_nothing_to_compare(where: str, tmp_path: Path) -> None:
    tokenizer = opened(saved(tmp_path, "LlamaTokenizerFast"))
    tokenizer.name_or_path = where
    assert differences(tokenizer) == []
    with pytest.raises(TokenizerError, match="does not give back plain English"):
        SpanTable(tokenizer)  # and it loses text all the same


def test_a_tokenizer_trained_anew_is_not_compared_with_the_old_file(tmp_path: Path) -> None:
    tokenizer = Same(tokenizer_object=load_tokenizer("byte-level").backend_tokenizer)
    tokenizer.name_or_path = str(saved(tmp_path, "LlamaTokenizerFast", "byte-level-nfc"))
    assert differences(tokenizer) == []
    SpanTable(tokenizer)


def test_the_repositorys_own_code_is_its_own_word(tmp_path: Path) -> None:
    kind = type("Own", (Rebuilt,), {"__module__": "transformers_modules.x.tokenization"})
    assert differences(opened(saved(tmp_path, "LlamaTokenizerFast"), kind)) == []


# Everything that loads by a name


def is_mistaken(folder: Path) -> bool:
    """Whether this version of transformers makes something else of it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode("A one.\n", add_special_tokens=False)
        return tokenizer.decode(ids) != "A one.\n"
    except Exception:
        return True


def test_the_command_line_loads_it_as_it_is_and_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path, "LlamaTokenizerFast")
    said = int(is_mistaken(folder))
    found = CliRunner().invoke(app, ["check-pair", "embedded", str(folder)])
    assert found.exit_code == 1, found.output  # NFC, see test_check_pair
    assert "not exact on 1 of 25 samples: combining marks" in found.stdout.replace("\n", " ")
    assert found.stderr.count("does not load this tokenizer as it is") == said
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "response": "A one. Two"}))
    other = str(saved(tmp_path / "other", "LlamaTokenizerFast"))  # it is said once for each
    scored = CliRunner().invoke(app, ["score", str(rows), "--generator-tokenizer", other])
    assert scored.exit_code == 0, scored.output
    assert "".join(json.loads(scored.stdout)["tokens"]) == "A one. Two"
    assert scored.stderr.count("does not load this tokenizer as it is") == said


def test_the_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(run, "run", lambda app, bound, settings: served.append(app) or 0)
    command = ["serve", "--port", "0", "--verifier", "embedded", "--generator-tokenizer"]
    folder = saved(tmp_path, "LlamaTokenizerFast")
    result = CliRunner().invoke(app, [*command, str(folder)])
    assert result.exit_code == 0, result.output
    said = int(is_mistaken(folder))
    assert result.stderr.count("does not load this tokenizer as it is") == said
    assert len(served) == 1


def test_verifiers_and_rewards_do(tmp_path: Path) -> None:
    folder = saved(tmp_path, "LlamaTokenizer")
    right = load_tokenizer("byte-level-nfc")
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(right), num_attention_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    with FakeEngine("vllm", right) as engine:
        served: Any = load_verifier(f"vllm:{engine.url}", tokenizer=str(folder))
        served.close()
    loaded = [
        load_by_name(str(folder)),
        load_by_name(f"hf:{folder}"),
        load_verifier(f"hf:{folder}", device="cpu").tokenizer,  # type: ignore[union-attr]
        load_verifier(f"random:{folder}", device="cpu").tokenizer,  # type: ignore[union-attr]
        load_reward("rent", str(folder)).table.tokenizer,
        served.tokenizer,
    ]
    ids = right.encode(TEXTS[0], add_special_tokens=False)
    for tokenizer in loaded:
        assert tokenizer.encode(TEXTS[0], add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == TEXTS[0]


# Plain English


def _set(name: str, value: Any) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, name, value)


WHITESPACE = pre.Whitespace()
SPLIT_AND_BYTES = pre.Sequence([pre.WhitespaceSplit(), pre.ByteLevel(add_prefix_space=True)])
MANGLED = {
    "no spaces: a byte-level vocabulary, split as words": (
        "byte-level", _set("pre_tokenizer", WHITESPACE), "'Lily had 12 .* becomes 'Lilyhad12red"),
    "no spaces: Metaspace": (
        "byte-level", _set("pre_tokenizer", pre.Metaspace()), "becomes 'Lilyhad12red"),
    "no spaces: no pre-tokenizer": (
        "byte-level", _set("pre_tokenizer", None), "becomes 'Lilyhad12red"),
    "no spaces: the normaliser's doing": (
        "bytes", _set("normalizer", normalizers.Replace(" ", "")), "becomes 'Lilyhad12red"),
    "no line breaks": ("bytes", _set("pre_tokenizer", SPLIT_AND_BYTES), "'Lily had.* becomes ' L"),
    "no decoder": ("byte-level", _set("decoder", None), "becomes 'L il y Ġ h ad"),
    "another's decoder": ("bytes", _set("decoder", decoders.WordPiece()), "becomes 'L i l y Ġ"),
    "no digits": (
        "bytes", _set("normalizer", normalizers.Replace(Regex(r"\d"), "0")), "becomes '.*had 00"),
    "SentencePiece without its Replace": (
        "sentencepiece", _set("normalizer", None), "spaces become the byte <0x20>"),
    "SentencePiece with a byte-level decoder": (
        "sentencepiece", _set("decoder", decoders.ByteLevel()), "becomes 'Lily▁had▁12"),
    "SentencePiece split as words": (
        "sentencepiece", _set("pre_tokenizer", WHITESPACE), r"here.\\nThe .* becomes .*here.The"),
    "Unigram without Metaspace": (
        "unigram", _set("pre_tokenizer", pre.WhitespaceSplit()), "becomes 'Lilyhad12red"),
    "Unigram without its decoder": ("unigram", _set("decoder", decoders.Fuse()), "▁Lily▁had▁12"),
    "WordPiece glued": ("wordpiece", _set("decoder", decoders.Fuse()), "becomes 'lilyha##d"),
    "WordPiece without its decoder": ("wordpiece", _set("decoder", None), "becomes 'lily ha ##d"),
    "suffixes without their decoder": ("suffix", _set("decoder", None), "becomes 'Li ly</w> h ad"),
    "an [UNK] that is none": (
        "bytes", _set("model", models.WordPiece({"a": 0}, unk_token="[UNK]")), "encoded at all"),
}  # fmt: skip


@pytest.mark.parametrize("what", MANGLED)
def test_mangled_tokenizers_are_refused(what: str) -> None:
    kind, change, said = MANGLED[what]
    tokenizer = changed(kind, change)
    with pytest.raises(TokenizerError, match=rf"does not give back plain English: .*{said}"):
        SpanTable(tokenizer)
    with pytest.raises(TokenizerError, match=r"Mend its tokenizer\.json, or use another"):
        require_faithful(tokenizer)


KNOWN = {
    "BERT's normaliser": ("bytes", _set("normalizer", normalizers.BertNormalizer())),
    "lower case": ("byte-level", _set("normalizer", normalizers.Lowercase())),
    "NFKC": ("byte-level", _set("normalizer", normalizers.NFKC())),
    "outer white space": ("byte-level", _set("normalizer", normalizers.Strip())),
    "one space for many": (
        "sentencepiece",
        _set("normalizer", normalizers.Sequence(
            [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(" ", "▁")])),
    ),
    "Metaspace in place of Replace": (
        "sentencepiece",
        lambda backend: (setattr(backend, "normalizer", None),
                         setattr(backend, "pre_tokenizer", pre.Metaspace(split=False))),
    ),
    "digits one by one": (
        "byte-level",
        _set("pre_tokenizer", pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", KNOWN)
def test_known_normalisers_are_not(what: str) -> None:
    kind, change = KNOWN[what]
    SpanTable(changed(kind, change))


def test_whole_tokenizers_are_not(tokenizer: Any) -> None:
    assert lost_prose(plain_backend(tokenizer.backend_tokenizer)) is None


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0, "b": 1}, []),
        models.BPE({c: i for i, c in enumerate("Lilyhad")}, []),  # words, and no space to part them
        models.WordLevel({"12": 0, "7": 1, "?": 2}, unk_token="?"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
    ],
)
def test_small_vocabularies_are_asked_for_what_they_have(model: Any) -> None:
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    SpanTable(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_check_is_made_once_for_each_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    import cme_reward.spans.table as spans

    calls: list[Any] = []
    monkeypatch.setattr(spans, "require_faithful", lambda *given: calls.append(given))
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer("byte-level")))
    SpanTable(tokenizer)
    SpanTable(tokenizer)
    assert len(calls) == 1


# check-pair


def test_a_pair_with_such_a_tokenizer_does_not_fit(tmp_path: Path) -> None:
    good, bad = load_tokenizer("bytes"), changed("byte-level", _set("pre_tokenizer", WHITESPACE))
    found = check(good, bad, ("g", "v"))
    assert not found.exact
    assert not found.identical_tokens
    assert found.samples == []
    assert found.verdict() == "refused: the tokenizer of the verifier does not keep the text"
    assert found.warnings()[0].startswith("the verifier: tokenizer '' (")
    assert "becomes 'Lilyhad12red" in found.warnings()[0]
    both = check(opened(saved(tmp_path, "LlamaTokenizerFast")), bad, ("g", "v"))
    assert both.verdict() == (
        "refused: the tokenizer of the generator and of the verifier does not keep the text"
    )
    assert "'A one. Two' becomes 'Aone.Two'" in both.refused["generator"]


@pytest.mark.parametrize("side", ["generator", "verifier"])
def test_check_pair_ends_in_status_1(side: str, tmp_path: Path) -> None:
    changed("byte-level", _set("pre_tokenizer", WHITESPACE)).save_pretrained(tmp_path)
    names = ["embedded", "embedded"]
    names[side == "verifier"] = str(tmp_path)
    verdict = f"refused: the tokenizer of the {side} does not keep the text"
    found = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["check-pair", *names])
    assert found.exit_code == 1, found.output
    assert found.stdout.rstrip().endswith(verdict)
    as_json = CliRunner().invoke(app, ["check-pair", *names, "--json"])
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["verdict"] == verdict
