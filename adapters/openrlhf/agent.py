"""For `--train.agent_func_path`: token-level cross-model entropy. See docs/openrlhf.md."""

from cme_reward.openrlhf import AgentExecutor as AgentExecutor
