"""For `--reward.remote_url`: sequence-level cross-model entropy. See docs/openrlhf.md."""

from cme_reward.openrlhf import reward_func as reward_func
