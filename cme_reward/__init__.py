"""Cross-model entropy: a label-free, dense reward for RL post-training of language models."""

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
