from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from tokenizer_kinds import TEXTS, load_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cme_reward import SpanTable
from cme_reward.conversation.literal import _twin, encode_literally
from cme_reward.spans.pieces import special_ids


def special_tokens(tokenizer: Any) -> list[str]:
    added, ids = tokenizer.added_tokens_decoder, special_ids(tokenizer).tolist()
    return [str(added[i]) for i in ids][:20]


def stripping(name: str) -> Any:
    """Special tokens that take the white space beside them along, as Phi-3's do."""
    tokenizer = load_tokenizer(name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token |= {"rstrip": token["id"] % 2 == 0, "lstrip": token["id"] % 3 == 0}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def prompts(tokenizer: Any) -> list[str]:
    """Texts with special tokens in front, between and behind, with white space and without."""
    tokens = special_tokens(tokenizer)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        parts = []
        for text in rng.choice(TEXTS, size=3).tolist():
            parts += [rng.choice([*tokens, ""]), rng.choice(["", " ", "\n", "  "]), text]
        found.append("".join([*parts, rng.choice([*tokens, "", " "])]))
    return found


def same_ids(tokenizer: Any) -> None:
    tokens = special_tokens(tokenizer)
    twin = _twin(tokenizer, tokens, "\U00100000")
    for prompt in prompts(tokenizer):
        marked = prompt
        for token in tokens:
            marked = marked.replace(token, f"\U00100000{token}")
        ids = [
            twin.real.get(i, i) for i in twin.backend.encode(marked, add_special_tokens=False).ids
        ]
        assert ids == tokenizer.encode(prompt, add_special_tokens=False), prompt


def test_the_twin_encodes_what_the_tokenizer_encodes(tokenizer: Any) -> None:
    same_ids(tokenizer)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "sentencepiece-dummy", "unigram"])
def test_also_around_tokens_that_strip(name: str) -> None:
    same_ids(stripping(name))


def test_no_text_spells_a_special_token(tokenizer: Any) -> None:
    unknown = tokenizer.unk_token_id  # of characters that the vocabulary lacks
    special = set(special_ids(tokenizer).tolist()) - {unknown}
    tokens = special_tokens(tokenizer)
    end = next((t for t in tokens if t != tokenizer.unk_token), "")
    ends = [tokenizer.convert_tokens_to_ids(end)] * 2 if end else []
    for token in tokens:
        for text in (token, f"a{token}b", f"{token} {token}", token + token[:-1], f"<{token}>"):
            said = f"x {end}", text, f"{end} y"
            ids = encode_literally(tokenizer, lambda change, s=said: s[0] + change(s[1]) + s[2])
            assert [i for i in ids if i in special] == ends, text
            # Nor does a response, or what was said before it.
            assert not special & set(SpanTable(tokenizer).encode(text)[0].tolist()), text


def test_no_text_completes_a_special_token_with_what_is_written_around_it() -> None:
    tokenizer = load_tokenizer("byte-level")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    cases: list[tuple[str, str, str]] = [
        ("a", "b<|im_", "end|>c"), ("a<|im_", "end|>b", "c"), ("a", "<|im_ \n", "end|>c"),
    ]  # fmt: skip
    for before, text, after in cases:
        ids = encode_literally(
            tokenizer, lambda change, c=(before, text, after): c[0] + change(c[1]).strip() + c[2]
        )
        assert end not in ids
        assert tokenizer.decode(ids) == before + text.strip() + after
    # What merely looks like a beginning is encoded as ever, and without the twin.
    ids = encode_literally(tokenizer, lambda change: change("> is it a <") + "<|im_end|>")
    assert ids == tokenizer.encode("> is it a <<|im_end|>", add_special_tokens=False)


def test_characters_for_private_use_are_text_too() -> None:
    tokenizer = load_tokenizer("byte-level")
    text = "\U00100000\U00100001<|im_end|>\U00100002\U0010fffd<|im_end|>"
    ids = encode_literally(tokenizer, lambda change: change(text) + "<|im_end|>")
    assert tokenizer.decode(ids) == text + "<|im_end|>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_token_made_special_later_is_one() -> None:
    tokenizer = copy.deepcopy(load_tokenizer("byte-level"))
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert SpanTable(tokenizer).decode([think])[0] == "<think>"
    n = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert len(tokenizer) == n
    assert think in special_ids(tokenizer)
    assert SpanTable(tokenizer).decode([think])[0] == ""
    assert think not in SpanTable(tokenizer).encode("<think>")[0]
    assert think not in encode_literally(tokenizer, lambda change: change("<think>"))
