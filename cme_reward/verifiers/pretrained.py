"""Models and tokenizers of ``transformers``, by name or path.

How weights are placed, converted or quantised is transformers' own business, and its options pass
through. What it says about options that do not work out is told as a `ConfigError`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_accelerate_available

from cme_reward.errors import CMEError, ConfigError, VerifierError
from cme_reward.loading import said
from cme_reward.spans.fidelity import load_faithful
from cme_reward.verifiers.whole import whole_weights

logger = logging.getLogger(__name__)


def load_trained(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or a hub repository, the model on its device."""
    dtype = checked_dtype(dtype)
    _check_device(device)
    _check_placement(device, kwargs)
    kwargs |= checked_attention(attn_implementation)
    with whole_weights(), _loading(name_or_path, kwargs):
        tokenizer = load_faithful(name_or_path, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **kwargs
        )
    choose_attention(model, attn_implementation)
    if kwargs.get("device_map") is None and not getattr(model, "is_quantized", False):
        model.to(device or _default_device())
    return model, tokenizer


def load_untrained(
    name_or_path: str,
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The same with random weights, which depend on `seed` alone."""
    dtype = checked_dtype(dtype)
    if kwargs:
        raise ConfigError(
            f"{sorted(kwargs)}: no options of an untrained verifier; expected seed, dtype, device, "
            "trust_remote_code, attn_implementation or those of TransformersVerifier"
        )
    _check_device(device)
    attention = checked_attention(attn_implementation)
    remote = {"trust_remote_code": trust_remote_code}
    with whole_weights(), _loading(name_or_path, attention):
        tokenizer = load_faithful(name_or_path, **remote)
        config = AutoConfig.from_pretrained(name_or_path, **remote)
        # Weights are drawn on the CPU, so its generator is the only one to seed and restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype, **attention, **remote
            )
    choose_attention(model, attn_implementation)
    model.to(device or _default_device())
    return model, tokenizer


def choose_attention(model: Any, asked: str | None) -> None:
    """See that soft-capped attention scores are capped: SDPA leaves the cap out, silently."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not capped or getattr(config, "_attn_implementation", None) != "sdpa":
        return
    if asked is not None:
        raise ConfigError(
            f"attn_implementation={asked!r} leaves out the soft cap on the attention scores of "
            f"{type(model).__name__}: expected 'eager', 'flash_attention_2' or 'flex_attention', "
            "or none, which takes 'eager' here"
        )
    model.set_attn_implementation("eager")


def warn_of_another_end(model: Any, tokenizer: Any, name: str) -> None:
    """Of a base model whose tokenizer ends texts with a token that the model never writes.

    Its end of turn is that token: with Gemma's chat tokenizer a base model is asked for
    `<end_of_turn>`, which costs every answer that has ended some 36 nats.
    """
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    known: set[Any] = set()
    for eos in (getattr(config, "eos_token_id", None) for config in configs):
        known |= set(eos) if isinstance(eos, list) else {eos}
    known -= {None}
    own, chat = tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)
    if known and own is not None and own not in known and chat is None:
        logger.warning(
            "%s: the tokenizer's eos_token %r (%d) is not among the model's own, %s: an end of "
            "turn is scored as a token that the model never writes. Expected the tokenizer of this "
            "model, or eos='mask'",
            name, tokenizer.eos_token, own, sorted(known),
        )  # fmt: skip


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ConfigError(
                f"dtype={dtype!r}: expected 'float32', 'bfloat16', 'float16', or 'auto' for the "
                "checkpoint's own"
            )
    return dtype


def checked_attention(asked: str | None) -> dict[str, str]:
    """The keyword for transformers; none where the choice is left to it: SDPA where it can."""
    if asked is None:
        return {}
    known = {"eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)}
    # A name with a slash is a repository of kernels on the hub.
    if asked not in known and "/" not in asked:
        raise ConfigError(
            f"attn_implementation={asked!r}: expected one of {sorted(known)}, or a repository of "
            "kernels on the hub such as 'kernels-community/flash-attn'"
        )
    return {"attn_implementation": asked}


def _check_device(device: Any) -> None:
    """Before minutes of loading what cannot be put there."""
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"{device=}: expected cpu, or a GPU such as cuda or cuda:0, of which torch sees {gpus} "
            f"here; or none for the GPU if there is one. torch says: {said(error)}"
        ) from error


def _check_placement(device: Any, kwargs: dict[str, Any]) -> None:
    device_map, quantization = kwargs.get("device_map"), kwargs.get("quantization_config")
    if device_map is not None and device is not None:
        raise ConfigError(f"{device=} and {device_map=}: expected one of them; leave out the other")
    if device_map is not None and not is_accelerate_available():
        raise ConfigError(
            f"{device_map=} needs the package accelerate: pip install accelerate, or give `device`"
        )
    for name in ("load_in_8bit", "load_in_4bit"):
        if name in kwargs:
            raise ConfigError(
                f"{name}={kwargs[name]!r}: transformers takes this as "
                f"quantization_config={{'{name}': True}} or a BitsAndBytesConfig"
            )
    if not (
        quantization is None
        or isinstance(quantization, dict)
        or hasattr(quantization, "quant_method")
    ):
        raise ConfigError(
            f"quantization_config={quantization!r}: expected a configuration of transformers such "
            "as BitsAndBytesConfig(load_in_8bit=True), or the same as a dict"
        )


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    # Before a trainer has chosen the process's device, it is the first one for all of them.
    rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.cuda.current_device() != 0 or rank >= torch.cuda.device_count()
    return "cuda" if chosen else f"cuda:{rank}"


@contextmanager
def _loading(name_or_path: str, options: dict[str, Any]) -> Iterator[None]:
    """What goes wrong, by whose fault it is: the options', the machine's or the checkpoint's."""
    shown = {key: "..." if "token" in key else value for key, value in options.items()}
    given = ", ".join(f"{key}={value!r}" for key, value in shown.items())
    try:
        yield
    except ImportError as error:  # accelerate, bitsandbytes, flash_attn, kernels, ...
        raise ConfigError(
            f"verifier {name_or_path!r} with {given or 'no options'} needs a package that is not "
            f"installed: install it, or leave that option out. transformers says: {said(error)}"
        ) from error
    except (CMEError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, for an unknown name, no network, a broken file
        raise _not_loaded(name_or_path, options, given, error) from error


def _not_loaded(
    name_or_path: str, options: dict[str, Any], given: str, error: Exception
) -> ConfigError | VerifierError:
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        return ConfigError(
            f"verifier {name_or_path!r} with {given}: expected options of TransformersVerifier or "
            f"of transformers' from_pretrained; check the spelling. transformers says: "
            f"{said(error)}"
        )
    asked = options.get("attn_implementation")
    if asked and "does not support" in str(error) and "ttention" in str(error):
        return ConfigError(
            f"attn_implementation={asked!r} does not go with {name_or_path!r}: expected "
            f"'eager', or none for the best that does. transformers says: {said(error)}"
        )
    return VerifierError(
        f"cannot load verifier {name_or_path!r}{f' with {given}' * bool(given)}: expected a "
        "directory with config.json, weights and tokenizer.json, or the name of a causal model on "
        "the hub (check the spelling, the network and HF_TOKEN). transformers says: "
        f"{type(error).__name__}: {said(error)}"
    )
