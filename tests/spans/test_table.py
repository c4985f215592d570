from __future__ import annotations

import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import BUILDERS, REAL, TEXTS, by_name, load_tokenizer, shared_rows
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cme_reward import InputError, SpanTable, TokenizerError
from cme_reward.spans.table import BLANK, NO_TEXT, TEXT, UNFINISHED

WHOLE = 12
# Kinds whose every id is a sequence of bytes, with what each id writes found independently.
BYTE_LEVEL = ["byte-level", "byte-level-nfc", "bytes"]


def written_bytes(tokenizer: Any, i: int) -> bytes:
    """What one id of a byte-level tokenizer writes, by transformers' own byte alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if i in tokenizer.added_tokens_decoder:
        token = tokenizer.added_tokens_decoder[i]
        return b"" if token.special else token.content.encode()
    inverse = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(inverse[char] for char in tokenizer.convert_ids_to_tokens(i))


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Encoded text, cut anywhere, with random ids of all kinds mixed in."""
    table = SpanTable(load_tokenizer(name))
    real = st.sampled_from(TEXTS).map(lambda text: table.encode(text)[0].tolist())
    cut = st.tuples(real, st.integers(0, 40), st.integers(1, 40)).map(
        lambda c: c[0][c[1] :][: c[2]]
    )
    anything = st.lists(st.integers(0, table.vocab_size - 1), max_size=8)
    return st.lists(st.one_of(cut, anything), max_size=4).map(
        lambda parts: [i for part in parts for i in part]
    )


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(deadline=None)
@given(data=st.data())
def test_byte_level_ends_are_those_of_the_oracle(name: str, data: st.DataObject) -> None:
    tokenizer = load_tokenizer(name)
    ids = data.draw(ids_of(name))
    text, ends = SpanTable(tokenizer).decode(ids)
    expected_text, expected = oracle.byte_cells([written_bytes(tokenizer, i) for i in ids])
    assert text == expected_text
    assert [Fraction(int(end), WHOLE) for end in ends] == expected


def test_half_a_surrogate_at_the_end_is_invalid_and_not_unfinished() -> None:
    """0xED 0xA1 begins a surrogate half: no third byte makes a character of it."""
    tokenizer = load_tokenizer("bytes")
    ids = [tokenizer.convert_tokens_to_ids(char) for char in "aíĤ"]  # 0x61 0xED 0x82: Hangul begins
    assert SpanTable(tokenizer).decode(ids)[0] == "a"
    ids = [tokenizer.convert_tokens_to_ids(char) for char in "aí¡"]
    assert SpanTable(tokenizer).decode(ids)[0] == tokenizer.decode(ids) == "a\ufffd\ufffd"


@pytest.mark.parametrize("name", by_name([*BUILDERS, *REAL]))
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_text_is_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    tokenizer = load_tokenizer(name)
    ids = data.draw(ids_of(name))
    decoded = SpanTable(tokenizer).decode_batch([ids])
    text, ends, kinds = decoded.texts[0], decoded.ends[0], decoded.kinds[0]
    # After an ordinary token, so that what a decoder does to the first one does not matter.
    before = tokenizer.convert_tokens_to_ids("a")
    own = tokenizer.backend_tokenizer.decode([before, *ids])
    if UNFINISHED in kinds:
        # The tokenizer shows the bytes of an unfinished character as U+FFFD, the verifier is not
        # shown them. SentencePiece shows the whole run of bytes so: nothing to compare with.
        assert own.rstrip("\ufffd") == "a" + text.rstrip("\ufffd") or name not in BYTE_LEVEL
    else:
        assert own == tokenizer.backend_tokenizer.decode([before]) + text or name == "suffix"
    assert len(ends) == len(kinds) == len(ids)
    assert (np.diff(ends, prepend=0) >= 0).all()
    assert ends[-1:].sum() == WHOLE * len(text) * bool(ids)
    assert ((np.diff(ends, prepend=0) > 0) <= (kinds != NO_TEXT)).all()


@pytest.mark.parametrize("text", TEXTS)
def test_encode_places_every_token(tokenizer: Any, text: str) -> None:
    table = SpanTable(tokenizer)
    (ids,), (ends,), (holes,) = table.encode_batch([text])
    assert ids.dtype == ends.dtype == np.int64
    widths = np.diff(ends, prepend=0)
    assert (widths > 0).all(), "a verifier token without text would lose its log-prob"
    # Tokens and holes tile the text: laid end to end they cover it once.
    starts = ends - widths
    for stop in holes[:, 1].tolist():
        after = np.searchsorted(ends, stop)
        starts[after : after + 1] = np.maximum(starts[after : after + 1], stop)
    cells = sorted([*zip(starts.tolist(), ends.tolist(), strict=True), *map(tuple, holes.tolist())])
    assert [0, *(stop for _, stop in cells)] == [*(start for start, _ in cells), WHOLE * len(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_encoded_decodes_to_the_same_places(tokenizer: Any, text: str) -> None:
    table = SpanTable(tokenizer)
    (ids,), (ends,), (holes,) = table.encode_batch([text])
    decoded, decoded_ends = table.decode(ids)
    if decoded == text and not len(holes):
        assert decoded_ends.tolist() == ends.tolist()
    elif tokenizer.backend_tokenizer.normalizer is None and table._pieces is not None:
        assert not len(holes)


def test_batches_are_their_rows(tokenizer: Any) -> None:
    table = SpanTable(tokenizer)
    encoded = table.encode_batch(TEXTS)
    decoded = table.decode_batch(encoded.ids)
    for b, text in enumerate(TEXTS):
        ids, ends = table.encode(text)
        assert (encoded.ids[b].tolist(), encoded.ends[b].tolist()) == (ids.tolist(), ends.tolist())
        one_text, one_ends = table.decode(ids)
        assert (decoded.texts[b], decoded.ends[b].tolist()) == (one_text, one_ends.tolist())


def test_lists_arrays_and_tensors_are_the_same(tokenizer: Any) -> None:
    import torch

    table = SpanTable(tokenizer)
    ids = table.encode(TEXTS[0])[0]
    forms: Any = (ids.tolist(), tuple(ids.tolist()), ids.astype(np.int32), torch.from_numpy(ids))
    for form in forms:
        assert table.decode(form)[1].tolist() == table.decode(ids)[1].tolist()


def one_byte(tokenizer: Any, byte: int) -> int:
    """The id of a single byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = (f"<0x{byte:02X}>", bytes_to_unicode()[byte])
    return next(i for i in map(tokenizer.get_vocab().get, names) if i is not None)


@pytest.mark.parametrize("name", ["bytes", "byte-level", "sentencepiece", "sentencepiece-dummy"])
def test_a_byte_of_a_character_is_its_exact_share(name: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = [one_byte(tokenizer, byte) for byte in "é你🤷".encode()]
    text, ends = SpanTable(tokenizer).decode(ids)
    assert text == "é你🤷"
    # 2 bytes of 6 twelfths, 3 of 4, 4 of 3
    assert ends.tolist() == [6, 12, 16, 20, 24, 27, 30, 33, 36]


@pytest.mark.parametrize("name", ["bytes", "byte-level", "sentencepiece"])
def test_a_character_cut_off_at_the_end_is_not_shown(name: str) -> None:
    tokenizer = load_tokenizer(name)
    table = SpanTable(tokenizer)
    ids = [*table.encode("x=")[0].tolist(), *(one_byte(tokenizer, b) for b in b"\xf0\x9f\xa4")]
    decoded = table.decode_batch([[*ids, tokenizer.eos_token_id]])
    assert decoded.texts == ["x="]
    assert decoded.ends[0][-4:].tolist() == [24, 24, 24, 24]
    assert decoded.kinds[0][-4:].tolist() == [UNFINISHED, UNFINISHED, UNFINISHED, NO_TEXT]


def test_stray_bytes_share_the_replacement_characters_of_the_decoder() -> None:
    # Byte-level: E4 BD is one maximal invalid sequence, FF another, then "a".
    tokenizer = load_tokenizer("bytes")
    ids = [one_byte(tokenizer, byte) for byte in b"\xe4\xbd\xffa"]
    text, ends = SpanTable(tokenizer).decode(ids)
    assert (text, ends.tolist()) == ("\ufffd\ufffda", [6, 12, 24, 36])
    # SentencePiece: a run of byte tokens that is invalid as a whole is one U+FFFD per byte, even
    # for the valid "你" in it.
    tokenizer = load_tokenizer("sentencepiece")
    ids = [one_byte(tokenizer, byte) for byte in b"\xe4\xbd\xa0\xff\xe4\xbd\xa0"]
    text, ends = SpanTable(tokenizer).decode(ids)
    assert text == "\ufffd" * 7 == tokenizer.backend_tokenizer.decode(ids)
    assert ends.tolist() == [12, 24, 36, 48, 60, 72, 84]


def test_special_tokens_have_no_text_and_other_added_tokens_do() -> None:
    tokenizer = load_tokenizer("byte-level")
    ids = [
        *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>", "<|im_end|>"]),
        *SpanTable(tokenizer).encode(" \n")[0].tolist(),
    ]
    decoded = SpanTable(tokenizer).decode_batch([ids])
    assert decoded.texts == ["<think> \n"]
    assert decoded.ends[0][:3].tolist() == [0, 84, 84]
    assert decoded.kinds[0][:3].tolist() == [NO_TEXT, TEXT, NO_TEXT]
    assert (decoded.kinds[0][3:] == BLANK).all()


def test_special_tokens_in_a_text_are_only_characters() -> None:
    tokenizer = load_tokenizer("byte-level")
    text = "stop<|im_end|>now"
    ids, ends = SpanTable(tokenizer).encode(text)
    assert tokenizer.eos_token_id not in ids.tolist()
    assert ends[-1] == WHOLE * len(text)


def test_white_space_is_judged_by_characters_not_tokens() -> None:
    # U+3000, the ideographic space, as three bytes.
    tokenizer = load_tokenizer("bytes")
    ids = [one_byte(tokenizer, byte) for byte in "a\u3000".encode()]
    assert SpanTable(tokenizer).decode_batch([ids]).kinds[0].tolist() == [TEXT, BLANK, BLANK, BLANK]


def test_text_continues_a_prompt_without_a_dummy_prefix() -> None:
    tokenizer = load_tokenizer("sentencepiece-dummy")
    assert tokenizer.decode(tokenizer.encode("she", add_special_tokens=False)) == "she"
    table = SpanTable(tokenizer)
    for text in ("she", " she", "  she"):
        ids, _ = table.encode(text)
        assert table.decode(ids)[0] == text


def test_a_normaliser_that_composes_and_reorders() -> None:
    # e + U+0301 is one NFC character, and the generator's two; s + two marks are reordered by NFC.
    table = SpanTable(load_tokenizer("byte-level-nfc"))
    for text in ("cafe\u0301 noir", "\u017f\u0323\u0307 x", "e\u0301🤷🏽"):
        (ids,), (ends,), (holes,) = table.encode_batch([text])
        assert not len(holes), text
        assert ends[-1] == WHOLE * len(text)
        assert len(ids) == len(np.unique(ends)), "overlapping offsets were not shared out"


def test_a_normaliser_that_removes_leaves_holes() -> None:
    # BERT strips the accent (character 4) and splits at the space (character 5).
    (_,), _, (holes,) = SpanTable(load_tokenizer("wordpiece")).encode_batch(["cafe\u0301 noir"])
    assert holes.tolist() == [[48, 72]]


def test_a_decoder_without_a_table_is_followed_step_by_step() -> None:
    tokenizer = load_tokenizer("suffix")
    table = SpanTable(tokenizer)
    assert table._pieces is None
    ids = table.encode("The happiness of one")[0].tolist()
    text, ends = table.decode([0, *ids])  # 0 is <unk>, special
    assert text == "The happiness of one" == tokenizer.backend_tokenizer.decode(ids)
    assert ends[0] == 0
    assert ends[-1] == WHOLE * len(text)


def test_a_decoder_that_cannot_be_followed_is_refused_by_name() -> None:
    # A decoder that rewrites text across tokens: what "b" adds to "a" is not in the text at all.
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.name_or_path = "merger"
    with pytest.raises(TokenizerError, match=r"'merger' cannot be aligned exactly.*'x'"):
        SpanTable(tokenizer).decode([0, 1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], r"response 0, position 1: id -1 is not in the vocabulary"),
        ([10**6], r"id 1000000 .*expected 0 <= id < \d+"),
        ([0.5], "integer token ids"),
        (np.array([0.5]), "dtype float64"),
        ([[1]], "flat sequence"),
        (["a"], "integer token ids"),
    ],
)
def test_refuses_what_is_not_an_id(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpanTable(load_tokenizer("byte-level")).decode(ids)


def test_refuses_a_lone_surrogate() -> None:
    with pytest.raises(InputError, match=r"text 1 holds the lone surrogate .* at character 2"):
        SpanTable(load_tokenizer("byte-level")).encode_batch(["fine", "ab\ud800"])


def test_refuses_a_slow_tokenizer() -> None:
    class Slow:
        name_or_path = "some/slow-model"

    with pytest.raises(TokenizerError, match=r"some/slow-model.*not a fast tokenizer"):
        SpanTable(Slow())


def test_the_callers_tokenizer_is_left_alone_and_its_state_ignored() -> None:
    tokenizer = load_tokenizer("byte-level")
    expected = SpanTable(tokenizer).encode(TEXTS[0])[0].tolist()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=99)
    try:
        assert SpanTable(tokenizer).encode(TEXTS[0])[0].tolist() == expected
        assert backend.truncation is not None
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_tables_are_cached_until_tokens_are_added() -> None:
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer("byte-level")))
    first = SpanTable(tokenizer)
    assert SpanTable(tokenizer)._pieces is first._pieces
    tokenizer.add_tokens(["<answer>"])
    second = SpanTable(tokenizer)
    assert second._pieces is not first._pieces
    assert second.decode([len(tokenizer) - 1])[0] == "<answer>"


def test_a_second_table_does_not_count_the_vocabulary_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`len(tokenizer)` copies it: a tenth of a second for Gemma's."""
    tokenizer = load_tokenizer("byte-level")
    n = SpanTable(tokenizer).vocab_size
    monkeypatch.setattr(type(tokenizer), "__len__", lambda _: pytest.fail("counted"))
    assert SpanTable(tokenizer).vocab_size == n


def test_pickles() -> None:
    table = pickle.loads(pickle.dumps(SpanTable(load_tokenizer("sentencepiece"))))
    assert table.decode(table.encode("back again")[0])[0] == "back again"


def test_tokens_are_legible() -> None:
    tokenizer = load_tokenizer("byte-level")
    ids = [one_byte(tokenizer, 0xF0), tokenizer.eos_token_id, *SpanTable(tokenizer).encode(" a")[0]]
    assert SpanTable(tokenizer).tokens(ids)[:2] == ["<0xF0>", "<|im_end|>"]
    assert "".join(SpanTable(tokenizer).tokens(ids)[2:]) == " a"


def test_real_sampled_ids_that_do_not_reencode(shared: Any) -> None:
    """On ids as sampled: real ones where there are any, an unusual split of a word otherwise."""
    if shared is None:
        tokenizer = load_tokenizer("byte-level")
        rows = [([one_byte(tokenizer, b) for b in b"happiness"], "happiness")]
    else:
        tokenizer = load_tokenizer("tok512")
        rows = [(row["meta"]["response_ids"], row["response"]) for row in shared_rows("dev_tinylm")]
    table = SpanTable(tokenizer)
    assert any(table.encode(text)[0].tolist() != ids for ids, text in rows)
    for ids, text in rows:
        assert table.decode(ids)[0] == text
