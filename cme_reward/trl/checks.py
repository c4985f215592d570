"""Settings of TRL under which per-token advantages would not mean what they say."""

from __future__ import annotations

from typing import Any

from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError
from cme_reward.spans.fidelity import require_faithful

# Measured with TRL 1.16: in these, d loss / d logp[i, t] is A[i, t] times a number of response i.
TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# In these, also with importance weights of whole responses, since they are held constant.
DETACHED_LOSSES = ("cispo", "vespo")

SCALES = {"group": "std", "batch": "batch", "none": "none"}


def check_settings(args: Any, config: CMEConfig, *, others: bool) -> None:
    """Refuse what would silently change or lose the advantages.

    Args:
        args: a `GRPOConfig`.
        config: the reward's.
        others: whether there are reward functions besides it.

    Raises:
        ConfigError: naming the setting, what it would do, and what to set instead.
    """
    if config.level == "token":
        _check_token_level(args)
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} divides the sum of "
            "all advantages by its deviation over the batch, which CME's part would escape. Each "
            'part is normalised before the sum here already: set "sum_then_normalize"'
        )
    if not others and SCALES.get(args.scale_rewards) != config.scale:
        raise ConfigError(
            f"GRPOConfig(scale_rewards={args.scale_rewards!r}) would have no effect: the reward is "
            f"normalised by CMEConfig(scale={config.scale!r}). Expected scale_rewards='group' with "
            "scale='std', 'batch' with 'batch', or 'none' with 'none'"
        )


def _check_token_level(args: Any) -> None:
    if args.loss_type not in TOKEN_LOSSES:
        raise ConfigError(
            f"loss_type={args.loss_type!r} has not been checked with per-token advantages; "
            f'expected one of {", ".join(TOKEN_LOSSES)} ("grpo" is the paper\'s objective)'
        )
    if args.importance_sampling_level != "token" and args.loss_type not in DETACHED_LOSSES:
        raise ConfigError(
            f"importance_sampling_level={args.importance_sampling_level!r} multiplies every "
            "token's advantage by one ratio of the whole response, whose gradient gives every "
            'token the mean advantage: credit per token is lost. Set "token", or '
            'CMEConfig(level="sequence")'
        )
    if args.off_policy_mask_threshold is not None:
        raise ConfigError(
            f"off_policy_mask_threshold={args.off_policy_mask_threshold} leaves out "
            "responses whose one advantage is negative; with an advantage per token it would leave "
            "out a response's negative tokens and keep its positive ones. Set None, or "
            'CMEConfig(level="sequence")'
        )


def check_tokenizer(processing_class: Any, scorer: Any) -> None:
    """Refuse a policy that samples with another tokenizer than the scorer reads, or an image model.

    Raises:
        ConfigError: naming both tokenizers.
        TokenizerError: for a policy's tokenizer that loses text, see `require_faithful`.
    """
    if hasattr(processing_class, "image_processor"):
        raise ConfigError(
            f"the processing class is a {type(processing_class).__name__} with images, and the "
            "verifier reads text alone. For prompts without images pass "
            "processing_class=AutoTokenizer.from_pretrained(...)"
        )
    tokenizer = getattr(scorer, "generator_tokenizer", None)
    if tokenizer is not processing_class:  # which has been checked
        require_faithful(processing_class)
    if tokenizer is not None and tokenizer.get_vocab() != processing_class.get_vocab():
        raise ConfigError(
            f"cme_reward_func was given the tokenizer {tokenizer.name_or_path!r} "
            f"({len(tokenizer)} tokens), but the policy samples with "
            f"{processing_class.name_or_path!r} ({len(processing_class)} tokens); pass the policy's"
        )
