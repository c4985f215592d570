"""Chat templates of many kinds, on small tokenizers in which their markup is special or is not."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizer_kinds import CHATML, REAL, load_tokenizer

QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA2_WITH_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{% set system, rest = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ system if loop.index0 == 0 else '' }}"
    "{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system role: at the head of the user's first message
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content + '\n\n', "
    "messages[1:] %}{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system if loop.first else '' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DATED = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|im_end|>\n" + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
PHI = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    "{{ m.content }}{{ eos_token }}{{ '' if loop.last else '\n' }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (  # no brackets and no special token but the end
    "{% for m in messages %}{{ 'ASSISTANT' if m.role == 'assistant' else 'USER' }}: "
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama2": LLAMA2_WITH_SYSTEM,
    "gemma": GEMMA,
    "dated": DATED,
}
WRITTEN = {
    **TEMPLATES,
    "mistral-like": MISTRAL,
    "phi-like": PHI,
    "deepseek-like": DEEPSEEK,
    "olmo-like": OLMO,
    "plain": PLAIN,
    "thinks": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
}
TOKENS = re.compile(
    r"<\|[a-zA-Z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|<\|\"\|>|\[/?[A-Z_]+\]"
)
_FOLDER = Path(trl.__file__).parent / "chat_templates"
# Their messages are lists of parts, images among them; a policy of text has no such template.
_OF_IMAGES = ("idefics3", "llava_next", "smolvlm")
OF_TRL = sorted(
    path.stem
    for path in _FOLDER.glob("*.jinja")
    if path.stem not in _OF_IMAGES and not path.stem.endswith("_training")  # the same markup
)
OF_SHARED = [name for name in ("gemma3", "llama2", "llama3", "olmo2-dolma2", "qwen2.5")
             if name in REAL]  # fmt: skip
KINDS = ("special", "text", "sentencepiece")
NAMES = [
    *(f"{name}/{kind}" for name in WRITTEN for kind in KINDS),
    *(f"trl:{name}/special" for name in OF_TRL),
    *OF_SHARED,
]


def with_template(name: str, template: str | None) -> Any:
    tokenizer = copy.deepcopy(load_tokenizer(name))
    tokenizer.chat_template = template
    return tokenizer


@cache
def chat_tokenizer(name: str) -> Any:
    """A generator's tokenizer by a name of `NAMES`."""
    if name in OF_SHARED:
        return load_tokenizer(name)
    name, _, kind = name.partition("/")
    template = (
        (_FOLDER / f"{name[4:]}.jinja").read_text() if name.startswith("trl:") else WRITTEN[name]
    )
    if kind == "sentencepiece":
        tokenizer = copy.deepcopy(load_tokenizer("sentencepiece-dummy"))
    else:
        tokenizer = copy.deepcopy(load_tokenizer("byte-level"))
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    if kind == "special":
        tokens = sorted(set(TOKENS.findall(template)))
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    tokenizer.name_or_path = name
    return tokenizer
