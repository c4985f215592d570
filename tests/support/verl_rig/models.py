"""A tiny policy with a tokenizer of its own, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral writes it, with its newer models' system prompt.
MISTRAL = (
    "{{ bos_token }}"
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As OLMo 2 writes it: the markup is no special tokens, but plain text.
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|assistant|>\n{{ m.content }}{{ eos_token }}{{ '' if loop.last else '\n' }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
OTHER_TOKENS = ["<pad>", "<s>", "</s>"]
NAMES = ("INST", "TOOL_RESULTS", "AVAILABLE_TOOLS", "SYSTEM_PROMPT")
BRACKETS = [f"[{end}{name}]" for name in NAMES for end in ("", "/")]
FAMILIES = {
    "chatml": (CHAT, CHATML_TOKENS),
    "mistral": (MISTRAL, [*OTHER_TOKENS, *BRACKETS]),
    "olmo": (OLMO, OTHER_TOKENS),
}
"""Chat template and special tokens: padding, the start of a text, its end, and others."""

TEXTS = [f"{a} plus {b} equals {a + b}. The answer is {a + b}." for a in range(40) for b in (3, 8)]
TEXTS += ["Anna has 4 apples. She buys 7 more and gives half of the oranges to a neighbor."] * 20
TEXTS += [' tool says 7 <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>']
TEXTS += ["system user assistant tool function type object properties string integer required"] * 2
TEXTS += ["".join(map(chr, range(32, 127))) + "\n"]


def policy_tokenizer(family: str = "chatml") -> PreTrainedTokenizerFast:
    """Byte-level BPE without bytes beyond ASCII, so that even an untrained model writes text.

    Tokens that hold parts of characters are for the tests of alignment.
    """
    template, special = FAMILIES[family]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()  # transformers gives it to every Qwen2
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    pad, start, end = special[:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=pad,
        **({} if family == "chatml" else {"bos_token": start}),
    )
    tokenizer.chat_template = template
    return tokenizer


def make_policy(folder: Path, max_length: int = 512, family: str = "chatml") -> Path:
    """About 130,000 parameters, untrained.

    Those of other families than ChatML's end a turn at every tenth token or so.
    """
    tokenizer: Any = policy_tokenizer(family)
    tokenizer.save_pretrained(folder)
    config, model = (
        (Qwen2Config, Qwen2ForCausalLM) if family == "chatml" else (LlamaConfig, LlamaForCausalLM)
    )
    made = config(
        vocab_size=len(tokenizer) + 8,  # padded, as real ones are
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        policy: Any = model(made)
        if family != "chatml":  # one feature is constant, and only the end has a weight on it
            policy.model.embed_tokens.weight[:, 0] = 1.0
            policy.lm_head.weight[:, 0] = 0.0
            norm = policy.model.embed_tokens.weight.square().mean(dim=1).sqrt().mean()
            policy.lm_head.weight[tokenizer.eos_token_id, 0] = 4.0 * norm
        policy.save_pretrained(folder)
    return folder


def make_prompts(path: Path, n: int = 16, agents: Sequence[str] = ()) -> Path:
    """A parquet file as veRL reads it, each prompt a different one, the agents in turns."""
    import pandas

    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{i} plus {i + 1} equals"}],
            "ability": "text",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i, "split": "train"},
            **({"agent_name": agents[i % len(agents)]} if agents else {}),
        }
        for i in range(n)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path
