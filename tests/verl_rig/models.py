"""A tiny policy with a tokenizer of its own, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHAT = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [f"{a} plus {b} equals {a + b}. The answer is {a + b}." for a in range(40) for b in (3, 8)]
TEXTS += ["Anna has 4 apples. She buys 7 more and gives half of the oranges to a neighbor."] * 20
TEXTS += [' tool says 7 <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>']
TEXTS += ["system user assistant tool function type object properties string integer required"] * 2
TEXTS += ["".join(map(chr, range(32, 127))) + "\n"]


def policy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without bytes beyond ASCII, so that even an untrained model writes text.

    Tokens that hold parts of characters are for the tests of alignment.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_policy(folder: Path, max_length: int = 512) -> Path:
    """About 130,000 parameters, untrained."""
    tokenizer: Any = policy_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,  # padded, as real ones are
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts(path: Path, n: int = 16, agent: str | None = None) -> Path:
    """A parquet file as veRL reads it, each prompt a different one."""
    import pandas

    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{i} plus {i + 1} equals"}],
            "ability": "text",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i, "split": "train"},
            **({"agent_name": agent} if agent else {}),
        }
        for i in range(n)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path
