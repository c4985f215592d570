"""Generators that think aloud: what the verifier is shown, what is scored, what is counted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import TableVerifier, logprob_of
from tokenizer_kinds import CHATML, load_tokenizer

from cme_reward import CMEConfig, ConfigError, CrossModelEntropy
from cme_reward.conversation.thinking import Piece, split_thoughts

TAGS = ("<think>", "</think>")
PREFILLS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
ASK = [{"role": "user", "content": "2 + 2?"}]
HEAD = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def answering(written: str, asked: str = "") -> str:
    """ChatML with this in front of what an assistant says, and at the end of generation prompts."""
    messages = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}" + written + "{% endif %}{{ m.content }}"
    )
    assert messages != CHATML
    return messages.replace("assistant\n{% endif %}", f"assistant\n{asked}{{% endif %}}")


VERIFIERS = {
    "opens": answering("", "<think>\n"),  # DeepSeek-R1
    "empty": answering(
        "{% if '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    ),  # Qwen3
    "both": answering(
        "{% if '<think>' not in m.content %}<think></think>{% endif %}", "<think>\n"
    ),  # Nemotron 3
    "closed": answering("", "<think></think>"),  # told not to think
    "channel": answering("<|final|>"),  # gpt-oss
}


def answers(*texts: str, tags: list[tuple[int, bool]] | None = None) -> list[Any]:
    pieces = [Piece(text) for text in texts]
    pieces[0].tags = tags or []
    return [
        ([piece.text[i:j] for i, j in split.answers], split.unclosed)
        for piece, split in zip(pieces, split_thoughts(pieces, TAGS), strict=True)
    ]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["Four."], [(["Four."], False)]),
        ([""], [([""], False)]),
        (["<think>so</think>\n\nFour."], [(["Four."], False)]),
        (["so</think>Four."], [(["Four."], False)]),  # opened unseen
        (["<think>\n", "so</think>Four."], [([""], True), (["Four."], False)]),  # pre-filled
        (["<think>\n\n</think>\n\n", "Four."], [([""], False), (["Four."], False)]),
        (["<think>so</think>", "\nFour."], [([""], False), (["Four."], False)]),
        (["<think>so"], [([""], True)]),
        (["Well <think>so</think> four <think>hm"], [(["Well ", "four ", ""], True)]),
        (["<think>a</think>b<think>c</think>d"], [(["b", "d"], False)]),
        (["<think>a<think>b</think>c</think>d"], [(["c</think>d"], False)]),
        (["<think>a", " 7 ", "b</think>c"], [([""], True), ([""], True), (["c"], False)]),
        (["a", "b</think>c"], [([""], True), (["c"], False)]),
        (["</think>"], [([""], False)]),
    ],
)
def test_answers_are_what_is_outside_the_tags(pieces: list[str], expected: list[Any]) -> None:
    assert answers(*pieces) == expected


def test_tags_that_are_special_tokens_are_in_no_text() -> None:
    assert answers("soFour.", tags=[(0, True), (2, False)]) == [(["Four."], False)]
    assert answers("soFour.", tags=[(2, False)]) == [(["Four."], False)]
    assert answers("so", tags=[(0, True)]) == [([""], True)]


def generator(template: str = CHATML, *, special: bool = False) -> Any:
    tokenizer = copy.deepcopy(load_tokenizer("byte-level"))
    tokenizer.chat_template = template
    if special:  # they are added tokens of the class's; these have a name of their own
        tokenizer.add_special_tokens({"additional_special_tokens": ["[T]", "[/T]", "<|call|>"]})
    return tokenizer


def scored(
    response: str, config: CMEConfig, tokenizer: Any, prompt: Any = ASK, end: bool = True
) -> tuple[Any, TableVerifier, list[int]]:
    """The batch of one response, the verifier that was asked, and the ids."""
    stub = TableVerifier(load_tokenizer("byte-level"))
    ids = tokenizer.encode(response) + [tokenizer.eos_token_id] * end
    return CrossModelEntropy(stub, tokenizer, config)([prompt], [ids]), stub, ids


def shown(stub: TableVerifier) -> list[tuple[str, str]]:
    decode = stub.tokenizer.decode
    return [(decode(p), decode(r)) for p, r in zip(stub.prompts, stub.responses, strict=True)]


END = "<|im_end|>"
WAYS = {  # template, response, tags, whether special; what precedes the answer when it is shown
    "written": (CHATML, "<think>so 4</think>\n\nFour.", TAGS, False, "<think>so 4</think>\n\n"),
    "pre-filled": (PREFILLS, "so four</think>\n\nFour.", TAGS, False,
                   "<think>\nso four</think>\n\n"),
    "unseen": (CHATML, "so four</think>Four.", TAGS, False, "so four</think>"),
    "other tags": (CHATML, "(so four) Four.", ("(", ")"), False, "(so four) "),
    "special": (CHATML, "[T]so four[/T]Four.", ("[T]", "[/T]"), True, "so four"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_three_ways_to_treat_thoughts(way: str) -> None:
    template, response, tags, special, context = WAYS[way]
    tokenizer = generator(template, special=special)
    prefill = "<think>\n" if template == PREFILLS else ""
    whole = context.removeprefix(prefill) + "Four."

    batch, stub, ids = scored(response, CMEConfig(thinking_tags=tags), tokenizer)
    assert shown(stub) == [(HEAD + prefill, whole + END)]
    n_thinking = batch.metrics["thinking_tokens"]
    assert 0 < n_thinking < len(ids)

    config = CMEConfig(thinking="condition", thinking_tags=tags)
    batch, stub, ids = scored(response, config, tokenizer)
    assert shown(stub) == [(HEAD + context, "Four." + END)]
    check_answer(batch, stub, ids, tokenizer)
    assert batch.metrics["thinking_tokens"] == n_thinking

    config = CMEConfig(thinking="hide", thinking_tags=tags)
    batch, stub, ids = scored(response, config, tokenizer)
    assert shown(stub) == [(HEAD, "Four." + END)]
    check_answer(batch, stub, ids, tokenizer)
    assert batch.metrics["thinking_unclosed"] == 0


def check_answer(batch: Any, stub: TableVerifier, ids: list[int], tokenizer: Any) -> None:
    """Rewards of the tokens of "Four." and of the end; nothing on the others."""
    n = len(tokenizer.encode("Four.")) + 1
    assert batch.mask[0].tolist() == [False] * (len(ids) - n) + [True] * n
    logprobs = logprob_of(np.array(stub.responses[0]))
    assert batch.token_rewards[0].sum().item() == pytest.approx(logprobs.sum(), abs=1e-6)
    assert batch.sequence_rewards[0].item() == pytest.approx(logprobs.mean(), abs=1e-6)
    assert batch.metrics["dropped_nats"] == pytest.approx(0, abs=1e-6)


def test_a_prompt_in_plain_text_has_no_pre_filled_thought() -> None:
    tokenizer = generator(PREFILLS)
    _, stub, _ = scored("Four.", CMEConfig(), tokenizer, prompt="2 + 2?")
    assert shown(stub) == [(HEAD, "Four." + END)]


def test_what_the_template_was_given_decides_what_is_pre_filled() -> None:
    template = CHATML.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    )
    tokenizer = generator(template)
    for quick, prefill in ((True, "<think>\n\n</think>\n\n"), (False, "")):
        for mode in ("score", "condition", "hide"):
            stub = TableVerifier(load_tokenizer("byte-level"))
            cme = CrossModelEntropy(
                stub,
                tokenizer,
                CMEConfig(thinking=mode),
                generator_template_kwargs={"quick": quick},
            )
            batch = cme([ASK], [tokenizer.encode("Four.")])
            assert shown(stub) == [(HEAD + prefill * (mode != "hide"), "Four.")]
            assert batch.mask.all()
            assert batch.metrics["thinking_tokens"] == 0


@pytest.mark.parametrize("mode", ["condition", "hide"])
def test_a_thought_that_was_cut_off_has_no_answer(mode: Any) -> None:
    tokenizer, config = generator(PREFILLS), CMEConfig(thinking=mode)
    batch, stub, _ = scored("so four is", config, tokenizer, end=False)
    assert stub.responses == []  # nothing to score
    assert not batch.mask.any()
    assert batch.sequence_rewards[0].item() == pytest.approx(-np.log(stub.vocab_size))
    assert batch.metrics["thinking_unclosed"] == 1

    batch, stub, ids = scored("so four is", config, tokenizer)  # ended without an answer
    thought = "<think>\nso four is" if mode == "condition" else ""
    assert shown(stub) == [(HEAD + thought, END)]
    assert batch.mask[0].tolist() == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize(
    ("verifier", "prompt", "response", "begun"),
    [
        ("opens", ASK, "<think>so</think>Four.", ""),  # both begin a thought: there is one
        ("opens", "2 + 2?", "so</think>Four.", "<think>\n"),  # opened unseen
        ("opens", ASK, "Four.", ""),  # in no thought
        ("opens", ASK, "Well. <think>so</think>Four.", ""),
        ("empty", ASK, "Four.", "<think>\n\n</think>\n\n"),
        ("empty", ASK, "<think>so</think>Four.", ""),
        ("empty", "2 + 2?", "so</think>Four.", ""),
        ("both", ASK, "Four.", "<think></think>"),
        ("both", ASK, "<think>so</think>Four.", ""),
        ("both", "2 + 2?", "so</think>Four.", "<think>\n"),
        ("closed", ASK, "Four.", "<think></think>"),
        ("closed", ASK, "<think>so</think>Four.", ""),
        ("channel", ASK, "Four.", "<|final|>"),
        ("channel", ASK, "<think>so</think>Four.", "<|final|>"),
    ],
)
def test_where_a_verifier_reads_an_answer(
    verifier: str, prompt: Any, response: str, begun: str
) -> None:
    """At the place at which its template writes one in a finished message, see VERIFIERS."""
    reads = copy.deepcopy(load_tokenizer("byte-level"))
    reads.chat_template = VERIFIERS[verifier]
    stub, tokenizer = TableVerifier(reads), generator()
    CrossModelEntropy(stub, tokenizer)([prompt], [tokenizer.encode(response)])
    assert shown(stub) == [(HEAD + begun, response)]
    if response.startswith("so"):
        return  # a message whose thought has no beginning is written by no template
    written = reads.apply_chat_template(
        [*ASK, {"role": "assistant", "content": response}], tokenize=False
    )
    only_asked = verifier == "closed" and bool(begun)
    assert (HEAD + begun + response in written) is not only_asked


@pytest.mark.parametrize("mode", ["condition", "hide"])
def test_an_end_of_turn_ends_the_last_answer_only(mode: Any) -> None:
    """Whatever stands in front of thoughts is no turn of its own."""
    for response, n in (("Well <think>so</think>four <think>hm</think>it is.", 3),
                        (" <think>so</think>four", 2)):  # fmt: skip
        batch, stub, _ = scored(response, CMEConfig(thinking=mode), generator())
        asked = [text for _, text in shown(stub)]
        assert [text.endswith(END) for text in asked] == [False] * (n - 1) + [True]
        sums = sum(logprob_of(np.array(row)).sum() for row in stub.responses)
        assert batch.token_rewards[0].sum().item() == pytest.approx(sums, abs=1e-5)
        assert len(batch.verifier_tokens[0][0]) == sum(map(len, stub.responses))


def test_an_empty_thought_in_special_tokens_is_closed() -> None:
    assert answers("Four.", tags=[(0, True), (0, False)]) == [(["Four."], False)]
    tokenizer = generator(special=True)
    for mode in ("condition", "hide"):
        config = CMEConfig(thinking=mode, thinking_tags=("[T]", "[/T]"))
        batch, stub, _ = scored("[T][/T]Four.", config, tokenizer)
        assert shown(stub) == [(HEAD, "Four." + END)]
        assert batch.metrics["thinking_unclosed"] == 0


@pytest.mark.parametrize("special_tokens", ["hide", "show"])
def test_a_pre_filled_tag_that_is_a_special_token(special_tokens: Any) -> None:
    """A thought that the template began with a special token, cut off or ended by a trainer."""
    tokenizer = generator(CHATML.replace("assistant\n{% endif %}", "assistant\n[T]\n{% endif %}"),
                          special=True)  # fmt: skip
    config = CMEConfig(
        thinking="condition", thinking_tags=("[T]", "[/T]"), special_tokens=special_tokens
    )
    batch, _, _ = scored("so four is", config, tokenizer, end=False)
    assert not batch.mask.any()
    assert batch.metrics["thinking_unclosed"] == 1

    stub = TableVerifier(load_tokenizer("byte-level"))
    cme = CrossModelEntropy(stub, tokenizer, config)
    ids = [tokenizer.encode(text) for text in ("so four is", "[/T]", "Four.")]
    mask = [sampled for sampled, row in zip((1, 0, 1), ids, strict=True) for _ in row]
    cme([ASK], [[i for row in ids for i in row]], [mask])
    named = ("[T]", "[/T]") if special_tokens == "show" else ("", "")
    assert shown(stub) == [(HEAD + named[0] + "\nso four is" + named[1], "Four.")]


def test_several_thoughts_and_a_base_verifier() -> None:
    tokenizer = generator()
    response = "<think>a</think>One, <think>b</think>two."
    expectations: dict[Any, list[tuple[str, str]]] = {
        "score": [("2 + 2?", response)],
        "condition": [
            ("2 + 2?<think>a</think>", "One, "),
            ("2 + 2?<think>a</think>One, <think>b</think>", "two."),
        ],
        "hide": [("2 + 2?", "One, "), ("2 + 2?One, ", "two.")],
    }
    for mode, expected in expectations.items():
        stub = TableVerifier(load_tokenizer("sentencepiece"))
        cme = CrossModelEntropy(stub, tokenizer, CMEConfig(thinking=mode))
        batch = cme([ASK], [tokenizer.encode(response)])
        assert shown(stub) == expected, mode
        total = sum(logprob_of(np.array(row)).sum() for row in stub.responses)
        assert batch.token_logprobs.sum().item() == pytest.approx(total, abs=1e-5)


def test_thoughts_of_earlier_turns_are_shown_or_hidden_as_well() -> None:
    tokenizer = generator(PREFILLS)
    first, last = (tokenizer.encode(text) for text in ("look</think>A?", "ah</think>B."))
    between = tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    mask = [1] * len(first) + [0] * len(between) + [1] * len(last)
    cases: list[tuple[Any, str, str]] = [
        ("condition", "<think>\nlook</think>A?", "<think>\nah</think>"),
        ("hide", "A?", ""),
    ]
    for mode, said, thought in cases:
        stub = TableVerifier(load_tokenizer("byte-level"))
        cme = CrossModelEntropy(stub, tokenizer, CMEConfig(thinking=mode))
        cme([ASK], [[*first, *between, *last]], [mask])
        prompt = f"{HEAD}{said}<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
        assert shown(stub)[-1] == (prompt + thought, "B.")


def test_at_the_sequence_level_thoughts_share_the_answers_reward() -> None:
    config = CMEConfig(level="sequence", thinking="condition")
    batch, stub, ids = scored("<think>so</think>Four.", config, generator())
    assert batch.mask.all()  # every sampled token, thoughts included
    assert batch.token_rewards[0, :-1].tolist() == [0] * (len(ids) - 1)
    mean = logprob_of(np.array(stub.responses[0])).mean()
    assert batch.token_rewards[0, -1].item() == pytest.approx(mean)


def test_special_tokens_inside_a_response_are_counted_or_shown() -> None:
    tokenizer = generator(special=True)
    batch, stub, ids = scored("x<|call|>f(2)", CMEConfig(), tokenizer)
    assert shown(stub) == [(HEAD, f"xf(2){END}")]  # glued, and said so
    assert batch.metrics["special_masked"] == 1
    call = ids.index(tokenizer.convert_tokens_to_ids("<|call|>"))
    assert not batch.mask[0, call]

    batch, stub, ids = scored("x<|call|>f(2)", CMEConfig(special_tokens="show"), tokenizer)
    assert shown(stub) == [(HEAD, f"x<|call|>f(2){END}")]
    assert batch.mask.all()
    assert batch.metrics["special_masked"] == 0
    # As ordinary characters: the name is scored as text, its log-probs all on the one token.
    own = stub.tokenizer.encode("x<|call|>f(2)")
    assert stub.responses[0][:-1] == own
    assert batch.token_logprobs.sum().item() == pytest.approx(
        logprob_of(np.array(stub.responses[0])).sum(), abs=1e-6
    )


def test_shown_special_tokens_are_tags_in_the_text() -> None:
    tokenizer = generator(special=True)
    config = CMEConfig(special_tokens="show", thinking="condition", thinking_tags=("[T]", "[/T]"))
    batch, stub, ids = scored("[T]so[/T]Four.", config, tokenizer)
    assert shown(stub) == [(HEAD + "[T]so[/T]", "Four." + END)]
    check_answer(batch, stub, ids, tokenizer)


def test_padding_is_no_special_token_of_the_response() -> None:
    tokenizer = generator()
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for shown_or_not in ("hide", "show"):
        stub = TableVerifier(load_tokenizer("byte-level"))
        cme = CrossModelEntropy(stub, tokenizer, CMEConfig(special_tokens=shown_or_not))
        ids = [*tokenizer.encode("ab"), end, pad, pad]
        batch = cme([ASK], [ids])
        assert batch.metrics["special_masked"] == 0
        assert shown(stub) == [(HEAD, "ab" + END)]


@pytest.mark.parametrize("tags", [["<a>"], "<a>", ("x", "x"), ("", "</a>"), (1, 2), "<a> <b> <c>"])
def test_tags_that_are_not_two_texts_are_refused(tags: Any) -> None:
    with pytest.raises(ConfigError, match=r"thinking_tags=.* must be two different texts"):
        CMEConfig(thinking_tags=tags)


def test_tags_from_text() -> None:
    for tags in ("<a> </a>", "<a>,</a>", ["<a>", "</a>"]):
        assert CMEConfig.from_dict({"thinking_tags": tags}).thinking_tags == ("<a>", "</a>")


_TEXT = st.text(st.sampled_from("ab \n🤷é"), max_size=5)
_PARTS = st.lists(st.one_of(_TEXT, st.sampled_from(TAGS)), max_size=8)
_GENERATORS: dict[str, Any] = {}


@settings(max_examples=150, deadline=None)
@given(parts=_PARTS, mode=st.sampled_from(["score", "condition", "hide"]),
       kind=st.sampled_from(["byte-level", "bytes", "sentencepiece-dummy"]))  # fmt: skip
def test_every_nat_is_on_a_token_that_writes_the_answer(
    parts: list[str], mode: Any, kind: str
) -> None:
    """Whatever the tags: what the verifier scored is on the tokens, and is the answers' text."""
    tokenizer = load_tokenizer(kind)
    cme, stub = _GENERATORS.get((kind, mode), (None, None))  # type: ignore[call-overload]
    if cme is None:
        stub = TableVerifier(load_tokenizer("byte-level"))
        cme = CrossModelEntropy(stub, tokenizer, CMEConfig(thinking=mode))
        _GENERATORS[kind, mode] = cme, stub  # type: ignore[index]
    text = "".join(parts)
    ids = cme.table.encode(text)[0].tolist()
    stub.responses = []
    batch = cme(["p"], [ids])
    split = split_thoughts([Piece(text)], TAGS)[0]
    wanted = [text[i:j] for i, j in split.answers] if mode != "score" else [text]
    got = [cme.members[0].table.decode(row)[0] for row in stub.responses]
    strip = kind == "sentencepiece-dummy"
    first = [t[1:] if n == 0 and text.startswith(" ") and (strip or t[1:2].strip()) else t
             for n, t in enumerate(wanted)]  # fmt: skip
    assert got in ([t for t in wanted if t], [t for t in first if t])
    total = sum(logprob_of(np.array(row)).sum() for row in stub.responses)
    assert batch.token_logprobs.sum().item() == pytest.approx(total, abs=1e-4)
    assert batch.metrics["thinking_unclosed"] == float(split.unclosed)
