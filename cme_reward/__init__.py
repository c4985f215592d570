"""Cross-model entropy: a label-free, dense reward for RL post-training of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cme_reward.advantages import group_advantages
    from cme_reward.alignment import align_batch, align_logprobs, overlap_weights
    from cme_reward.batch import CMEBatch
    from cme_reward.config import CMEConfig
    from cme_reward.errors import CMEError, ConfigError, InputError, TokenizerError, VerifierError
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.spans import SpanTable
    from cme_reward.verifiers import Ensemble, Verifier, load_verifier

__version__ = "0.1.0"

__all__ = [
    "CMEBatch",
    "CMEConfig",
    "CMEError",
    "ConfigError",
    "CrossModelEntropy",
    "Ensemble",
    "InputError",
    "SpanTable",
    "TokenizerError",
    "Verifier",
    "VerifierError",
    "align_batch",
    "align_logprobs",
    "group_advantages",
    "load_verifier",
    "overlap_weights",
]

# Names come with their module when first used, so that `cme-reward --help` does not wait for torch.
_MODULES = {
    "advantages": ["group_advantages"],
    "alignment": ["align_batch", "align_logprobs", "overlap_weights"],
    "batch": ["CMEBatch"],
    "config": ["CMEConfig"],
    "errors": ["CMEError", "ConfigError", "InputError", "TokenizerError", "VerifierError"],
    "reward": ["CrossModelEntropy"],
    "spans": ["SpanTable"],
    "verifiers": ["Ensemble", "Verifier", "load_verifier"],
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"cme_reward.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
