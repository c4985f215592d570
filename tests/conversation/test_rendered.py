"""Rendered prompts read back: exactly, or not at all."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import TEMPLATES
from tokenizer_kinds import CHATML, REAL, load_tokenizer

from cme_reward import InputError, SpanTable
from cme_reward.conversation.rendered import RenderedReader, messages_from_label

ASK = [{"role": "user", "content": "What is 2 + 3?\n\nSay it in one word."}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
LONG_TALK = [*TALK, {"role": "assistant", "content": "4"}, {"role": "user", "content": "5"}]


def generator(template: str, kind: str = "byte-level") -> Any:
    tokenizer = copy.deepcopy(load_tokenizer(kind))
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [ASK, TALK, LONG_TALK, SYSTEM + ASK, SYSTEM + TALK, SYSTEM + LONG_TALK],
    ids=["ask", "talk", "long", "system-ask", "system-talk", "system-long"],
)
def test_a_rendered_conversation_is_read_back(template: str, messages: Any) -> None:
    kind = "sentencepiece-dummy" if template == "llama2" else "byte-level"
    tokenizer = generator(template, kind)
    got = RenderedReader(tokenizer).prompt(render(tokenizer, messages))
    if template == "gemma" and messages[0]["role"] == "system":
        # Gemma's template writes one message of the two, and nothing tells them apart again.
        first = {"role": "user", "content": f"Be brief.\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    assert got == messages


def test_a_system_prompt_of_the_template_is_none_of_the_users() -> None:
    tokenizer = generator("qwen")
    assert "You are helpful" in render(tokenizer, ASK)
    assert RenderedReader(tokenizer).prompt(render(tokenizer, ASK)) == ASK
    other = [{"role": "system", "content": "You are terse."}, *ASK]
    assert RenderedReader(tokenizer).prompt(render(tokenizer, other)) == other


@pytest.mark.parametrize(
    "start",
    [
        "",
        "\n\n  ",
        "  {% if true %}  \n{% endif %}\n",
        " \n{%- if strftime_now is defined %}{% endif %}",
    ],
    ids=["none", "lines", "block", "stripped"],
)
def test_a_date_is_taken_from_the_prompt(start: str) -> None:
    """A trainer renders its prompts once; a run goes on after midnight.

    White space of the template counts, the part that jinja trims at its start included.
    """
    dated = start + TEMPLATES["dated"]
    tokenizer = generator(dated)
    reader = RenderedReader(tokenizer)

    def on(date: str, messages: Any) -> str:
        assert "strftime_now('%d %b %Y')" in dated
        template = dated.replace("strftime_now('%d %b %Y')", f"'{date}'")
        return render(tokenizer, messages, chat_template=template)

    for messages in (ASK, SYSTEM + TALK):
        yesterday = on("31 Dec 1999", messages)
        assert "31 Dec 1999" in yesterday
        assert reader.prompt(yesterday) == messages
        assert reader.prompt(render(tokenizer, messages)) == messages  # today's
    with pytest.raises(InputError, match=r"cannot read the prompt .*im_start"):
        reader.prompt(on("today", ASK))


def test_a_prompt_in_plain_text_is_one() -> None:
    tokenizer = generator("llama2", "sentencepiece-dummy")
    assert RenderedReader(tokenizer).prompt("<s>Once upon a <s> time") == "Once upon a <s> time"
    assert RenderedReader(load_tokenizer("sentencepiece")).prompt("Q: 2?\nA:") == "Q: 2?\nA:"


def test_a_prompt_without_its_bos_is_read() -> None:
    tokenizer = generator("llama2", "sentencepiece-dummy")
    rendered = render(tokenizer, TALK)
    assert RenderedReader(tokenizer).prompt(rendered.removeprefix("<s>")) == TALK


def test_options_of_the_template() -> None:
    tokenizer = generator(CHATML + "{% if quick %}<think>\n\n</think>\n\n{% endif %}")
    rendered = render(tokenizer, ASK, quick=True)
    assert RenderedReader(tokenizer, {"quick": True}).prompt(rendered) == ASK
    with pytest.raises(InputError, match="markup"):
        RenderedReader(tokenizer).prompt(rendered)


@pytest.mark.parametrize(
    "rendered",
    [
        render(generator("chatml"), [*ASK, *ASK]),
        render(generator("chatml"), [*TALK[:2], {"role": "tool", "content": "4"}]),
        render(generator("chatml"), TALK[1:]),
        render(generator("chatml"), ASK).removesuffix("assistant\n"),
        "<|im_start|>user\nhalf a prompt",
        "cut on the left<|im_end|>\n<|im_start|>assistant\n",
    ],
    ids=["user-twice", "tool", "assistant-first", "cut-right", "unfinished", "cut-left"],
)
def test_other_markup_is_refused_and_never_text(rendered: str) -> None:
    with pytest.raises(InputError, match=r"'<\|im_start\|>' in it is markup .* as JSON in the la"):
        RenderedReader(generator("chatml")).prompt(rendered)


def test_markup_that_is_no_special_token_is_refused_too() -> None:
    reader = RenderedReader(generator("llama2", "sentencepiece-dummy"))
    for rendered in ("<s>[INST] a [/INST]<s>[INST] b [/INST]", "[INST] a", "<<SYS>>\nS\n<</SYS>>"):
        with pytest.raises(InputError, match="is markup"):
            reader.prompt(rendered)


_CACHE: dict[str, Any] = {}
_READERS: dict[str, RenderedReader] = {}
text = st.text(st.sampled_from("ab \n<s>[/]|é🤷"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    template=st.sampled_from(list(TEMPLATES)),
    system=st.none() | text,
    contents=st.lists(text, min_size=1, max_size=5).filter(lambda c: len(c) % 2 == 1),
)
def test_whatever_is_read_renders_the_same(
    template: str, system: str | None, contents: list[str]
) -> None:
    tokenizer = _CACHE.setdefault(template, generator(template, "sentencepiece-dummy"))
    reader = _READERS.setdefault(template, RenderedReader(tokenizer))
    messages = [
        {"role": ["user", "assistant"][k % 2], "content": c} for k, c in enumerate(contents)
    ]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    rendered = render(tokenizer, messages)
    try:
        got = reader.prompt(rendered)
    except InputError:
        return  # contents that look like markup
    if isinstance(got, str):
        assert got == rendered  # a template without markup for this conversation
    else:
        assert render(tokenizer, [dict(m) for m in got]) == rendered


def test_a_prompt_made_to_be_slow_is_read_in_one_go() -> None:
    """As many turns as can be: the work is bounded (no assertion on time, or this never ends)."""
    reader = RenderedReader(generator("llama2", "sentencepiece-dummy"))
    with pytest.raises(InputError):
        reader.prompt("<s>[INST] a" + " [/INST] b </s><s>[INST] c" * 20_000)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece-dummy"])
def test_the_response_is_what_follows_the_prompt(kind: str) -> None:
    tokenizer = generator("llama2" if "sentencepiece" in kind else "chatml", kind)
    reader, table = RenderedReader(tokenizer), SpanTable(tokenizer)
    rendered = render(tokenizer, ASK)
    prompt_ids = tokenizer.encode(rendered, add_special_tokens=False)
    for written in (" Größe 🤷🏽, one\n", "no space", ""):
        sampled = [*table.encode(written)[0].tolist(), tokenizer.eos_token_id]
        query = tokenizer.decode([*prompt_ids, *sampled], skip_special_tokens=False)
        got = reader.ids(reader.response(query, rendered))
        assert got[-1] == tokenizer.eos_token_id
        assert table.decode(got)[0] == table.decode(sampled)[0]


def test_a_query_of_which_the_trainer_cut_the_start() -> None:
    reader = RenderedReader(generator("chatml"))
    rendered = render(reader.tokenizer, [{"role": "user", "content": "again and again, " * 9}])
    for cut in (1, 20, 60, 100):
        assert reader.response(rendered[cut:] + "yes", rendered) == "yes"
    for query in ("yes", "", "<|im_start|>user\n", rendered[:-1] + "yes"):
        with pytest.raises(InputError, match="does not start with its prompt"):
            reader.response(query, rendered)


def test_the_rest_of_a_character_that_was_cut_off_is_not_text() -> None:
    reader = RenderedReader(generator("chatml"))
    assert reader.ids("ok \ufffd") == reader.ids("ok ")
    assert reader.ids("ok \ufffd<|im_end|>") != reader.ids("ok <|im_end|>")


def test_labels_that_carry_messages() -> None:
    for label in (ASK, json.dumps(ASK), " " + json.dumps(SYSTEM + ASK)):
        got = messages_from_label(label)
        assert got is not None
        assert got[-1] == ASK[0]
    # What a data set adds to its messages is not for templates to see.
    parts = {"content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]}
    got = messages_from_label([{"role": "user", **parts, "weight": 1, "name": None}])
    assert got == [{"role": "user", "content": "How many?"}]
    with pytest.raises(InputError, match=r"label is not one \(message 0 .* holds 3"):
        messages_from_label([{"role": "user", "content": 3}])
    with pytest.raises(InputError, match=r"label is not one .* half of a surrogate pair"):
        messages_from_label(json.dumps([{"role": "user", "content": "\ud800"}]))
    for label in (None, "42", "[1, 2]", "[half", "[]", [], 7, {"role": "user"}, "[" * 100_000):
        assert messages_from_label(label) is None
    with pytest.raises(InputError, match=r"end with the assistant's 'Two\.'"):
        messages_from_label(TALK[:2])


def test_real_tokenizers() -> None:
    """Those of CME_SHARED, and one trained here."""
    for name in ("byte-level", *({"llama3", "qwen2.5", "gemma3"} & set(REAL))):
        tokenizer = load_tokenizer(name)
        reader, table = RenderedReader(tokenizer), SpanTable(tokenizer)
        for messages in (ASK, TALK, LONG_TALK):
            rendered = render(tokenizer, messages)
            assert reader.prompt(rendered) == messages
            ids = tokenizer.encode(rendered, add_special_tokens=False)
            sampled = [*table.encode("So , it's 5!")[0].tolist(), tokenizer.eos_token_id]
            query = tokenizer.decode(
                [*ids, *sampled],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,  # as transformers 5; 4 would mend " ,"
            )
            assert reader.ids(reader.response(query, rendered)) == sampled


def test_a_prompt_is_read_once_for_all_its_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = generator("chatml")
    reader, rendered = RenderedReader(tokenizer), render(tokenizer, TALK)
    assert reader.prompt(rendered) == TALK
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", None)
    assert reader.prompt(rendered) == TALK
    with pytest.raises(TypeError):
        reader.prompt(rendered.replace("?", "!", 1))


def test_of_a_response_only_what_has_text_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = generator("chatml")
    reader, asked = RenderedReader(tokenizer), []
    encode = reader.table.encode_batch
    monkeypatch.setattr(
        reader.table, "encode_batch", lambda texts: asked.append(texts) or encode(texts)
    )
    assert tokenizer.decode(reader.ids("Yes.<|im_end|>")) == "Yes.<|im_end|>"
    assert tokenizer.decode(reader.ids("<|im_end|>")) == "<|im_end|>"
    assert reader.ids("") == []
    assert asked == [["Yes."], [], []]
