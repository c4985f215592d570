"""Cross-model entropy: a label-free, dense reward for RL post-training of language models."""

from typing import TYPE_CHECKING

from cme_reward._lazy import lazy

if TYPE_CHECKING:
    from cme_reward.advantages import group_advantages
    from cme_reward.alignment import align_batch, align_logprobs, overlap_weights
    from cme_reward.batch import CMEBatch
    from cme_reward.config import CMEConfig
    from cme_reward.errors import CMEError, ConfigError, InputError, TokenizerError, VerifierError
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.spans.table import SpanTable
    from cme_reward.verifiers import Ensemble, Verifier, load_verifier
    from cme_reward.verifiers.batching import BatchingVerifier
    from cme_reward.verifiers.hf import TransformersVerifier

__version__ = "0.2.0"

__all__ = [
    "BatchingVerifier",
    "CMEBatch",
    "CMEConfig",
    "CMEError",
    "ConfigError",
    "CrossModelEntropy",
    "Ensemble",
    "InputError",
    "SpanTable",
    "TokenizerError",
    "TransformersVerifier",
    "Verifier",
    "VerifierError",
    "align_batch",
    "align_logprobs",
    "group_advantages",
    "load_verifier",
    "overlap_weights",
]

_HOMES = {
    "BatchingVerifier": "verifiers.batching",
    "CMEBatch": "batch",
    "CMEConfig": "config",
    "CMEError": "errors",
    "ConfigError": "errors",
    "CrossModelEntropy": "reward",
    "Ensemble": "verifiers",
    "InputError": "errors",
    "SpanTable": "spans.table",
    "TokenizerError": "errors",
    "TransformersVerifier": "verifiers.hf",
    "Verifier": "verifiers",
    "VerifierError": "errors",
    "align_batch": "alignment",
    "align_logprobs": "alignment",
    "group_advantages": "advantages",
    "load_verifier": "verifiers",
    "overlap_weights": "alignment",
}
__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
