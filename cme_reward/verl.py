"""Cross-model entropy in veRL: one line in its configuration, and a reward for every token.

`python -m cme_reward.verl CONFIG.yaml [overrides]` starts veRL's own trainer. See docs/verl.md.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

if __name__ == "__main__":  # before veRL is imported, which takes seconds
    from cme_reward._verl.launch import main

    raise SystemExit(main())

from cme_reward._verl.settings import check_version

try:
    check_version()
    from cme_reward._verl.advantages import cme_grpo
    from cme_reward._verl.loop import CMEAgentLoopManager
    from cme_reward._verl.reward import CMEReward, compute_score
except ModuleNotFoundError as error:
    if error.name not in ("verl", "ray", "transfer_queue", "cachetools"):
        raise
    raise ModuleNotFoundError(
        'cme_reward.verl needs veRL: pip install "cme-reward[verl]"', name=error.name
    ) from error

__all__ = ["CMEAgentLoopManager", "CMEReward", "cme_grpo", "compute_score"]
