from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import load_tokenizer

from cme_reward import CMEConfig, InputError
from cme_reward.prompts import PromptFormat

# Refuses what Gemma's template refuses: a second speaker of the same role, and unknown roles.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def with_template(name: str, template: str | None) -> Any:
    tokenizer = copy.deepcopy(load_tokenizer(name))
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: Any, prompt: Any, config: CMEConfig = CMEConfig()) -> str:  # noqa: B008
    return tokenizer.decode(PromptFormat(tokenizer, config).render(prompt))


def test_a_string_is_one_user_message_before_a_generation_prompt() -> None:
    tokenizer = load_tokenizer("byte-level")
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(tokenizer, "Hi") == expected
    assert rendered(tokenizer, [{"role": "user", "content": "Hi"}]) == expected


def test_the_verifiers_system_prompt_stands_in_only_where_there_is_none() -> None:
    tokenizer = load_tokenizer("byte-level")
    config = CMEConfig(system_prompt="Be strict.")
    assert rendered(tokenizer, "Hi", config).startswith("<|im_start|>system\nBe strict.<|im_end|>")
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert "Be strict." not in rendered(tokenizer, own, config)


def test_template_options_and_another_template() -> None:
    tokenizer = with_template("byte-level", THINKING)
    assert rendered(tokenizer, "Hi").endswith("<|im_start|>")
    off = CMEConfig(chat_template_kwargs={"enable_thinking": False})
    assert rendered(tokenizer, "Hi", off).endswith("<think></think>")
    other = CMEConfig(chat_template="Q: {{ messages[0].content }} A:")
    assert rendered(tokenizer, "Hi", other) == "Q: Hi A:"


def test_never_two_bos() -> None:
    tokenizer = with_template("sentencepiece", STRICT)
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", tokenizer.eos_token_id)]
    )
    assert PromptFormat(tokenizer).render("Hi").count(bos) == 1
    tokenizer.chat_template = None
    base = PromptFormat(tokenizer)
    hi = tokenizer.encode("Hi", add_special_tokens=False)
    # BOS in front, no EOS behind; a BOS already in the text is not doubled; nothing at all is BOS.
    assert base.render("Hi") == [bos, *hi]
    assert base.render("<s>Hi") == [bos, *hi]
    assert base.render("") == [bos]


def test_a_base_verifier_sees_plain_text() -> None:
    tokenizer = with_template("byte-level", None)
    assert rendered(tokenizer, "Once upon") == "Once upon"
    assert rendered(tokenizer, [{"role": "user", "content": "Once"}]) == "Once"
    assert rendered(tokenizer, "x", CMEConfig(system_prompt="Be brief.")) == "Be brief.\n\nx"
    assert PromptFormat(tokenizer).end_of_turn == tokenizer.eos_token_id
    assert PromptFormat(tokenizer).render("") == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no BOS or EOS to start from"):
        PromptFormat(tokenizer).render("")
    with pytest.raises(InputError, match="no chat template for a conversation of 2 messages"):
        PromptFormat(tokenizer).render([{"role": "user", "content": "a"}] * 2)


def test_the_end_of_turn_is_what_the_template_writes_after_an_answer() -> None:
    assert PromptFormat(load_tokenizer("byte-level")).end_of_turn == load_tokenizer(
        "byte-level"
    ).convert_tokens_to_ids("<|im_end|>")
    llama = PromptFormat(with_template("sentencepiece", LLAMA2))
    # Llama-2 writes " answer </s>": a space before the answer, and EOS ends the turn, not a space.
    assert llama.lead == " "
    assert llama.end_of_turn == llama.tokenizer.eos_token_id


def test_roles_a_template_refuses_are_put_in_ones_it_knows() -> None:
    tokenizer = with_template("sentencepiece", STRICT)
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": "search(x)"},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    text = rendered(tokenizer, conversation)
    assert "<start_of_turn>user\nBe kind.\n\nLook it up.<end_of_turn>" in text
    assert "<start_of_turn>user\none\n\ntwo<end_of_turn>" in text


def test_a_conversation_no_role_of_which_fits_is_refused() -> None:
    tokenizer = with_template("sentencepiece", STRICT)
    with pytest.raises(InputError, match=r"refuses a conversation of roles \['assistant'\].*alter"):
        PromptFormat(tokenizer).render([{"role": "assistant", "content": "Hi"}])
    bad: list[Any] = [[], [{"content": "x"}], [3]]
    for wrong in bad:
        with pytest.raises(InputError, match="expected"):
            PromptFormat(tokenizer).render(wrong)


def test_real_templates(shared: Any) -> None:
    names = ["gemma3", "qwen2.5", "llama2", "llama3", "olmo2-dolma2"] if shared else ["byte-level"]
    for name in names:
        tokenizer = load_tokenizer(name)
        prompt = PromptFormat(tokenizer)
        ids = prompt.render("Hi")
        assert ids.count(tokenizer.bos_token_id) <= 1
        assert (
            tokenizer.decode(ids)
            .rstrip()
            .endswith(("model", "assistant", "[/INST]", "<|end_header_id|>", "<|assistant|>"))
        )
        assert prompt.end_of_turn in tokenizer.added_tokens_decoder
