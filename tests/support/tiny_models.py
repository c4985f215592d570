"""Random models of many architectures, small enough for exactness tests, and the plain forward."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB = 307
# The prompts below are longer than the window, so that a cache in use is a full one.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "gemma2": Gemma2Config(
        **SIZES,
        sliding_window=5,
        layer_types=LAYERS,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=5, layer_types=LAYERS, final_logit_softcapping=2.0
    ),
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_positions=96, n_embd=32, n_layer=3, n_head=4, bos_token_id=1
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=32,
    ),
}


def trained_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build(config, dtype=torch.float32, scale: float = 10.0):
    """A random model whose logits are large enough for caps and caches to matter.

    It has a config of its own: one that is given other embeddings writes there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # Only the eager attention knows Gemma-2's cap on attention logits.
        attention = "eager" if config.model_type == "gemma2" else "sdpa"
        model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention)
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.data *= scale
    return model.to(dtype)


@torch.inference_mode()
def oracle(model, prompt, response) -> np.ndarray:
    """One whole forward pass, one float32 log-softmax, one gather."""
    if not len(response):
        return np.empty(0, np.float32)
    ids = torch.tensor([*prompt, *response])
    logprobs_TV = model(ids[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs_TV.gather(-1, ids[1:, None])[len(prompt) - 1 :, 0].numpy()


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng([seed, *lengths])
    return [rng.integers(VOCAB, size=n).tolist() for n in lengths]


def ragged_batch() -> tuple[list[list[int]], list[list[int]]]:
    """Groups of 4, 3, 2 and 1, in mixed order; a prompt of one token; two empty responses."""
    first, second, third, single = draw(17, 9, 1, 12)
    prompts = [first, second, first, single, third, second, first, second, third, first]
    return prompts, draw(5, 21, 0, 8, 13, 2, 21, 0, 6, 1, seed=1)


def assert_equals_oracle(verifier, prompts, responses, atol: float = 1e-5) -> None:
    got = verifier.logprobs(prompts, responses)
    assert len(got) == len(responses)
    for prompt, response, logprobs in zip(prompts, responses, got, strict=True):
        assert logprobs.dtype == np.float32
        assert logprobs.shape == (len(response),)
        np.testing.assert_allclose(
            logprobs, oracle(verifier.model, prompt, response), rtol=0, atol=atol
        )
