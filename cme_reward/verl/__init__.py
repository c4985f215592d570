"""Cross-model entropy in veRL: one line in its configuration, and a reward for every token.

`python -m cme_reward.verl CONFIG.yaml [overrides]` starts veRL's own trainer. See docs/verl.md.
Names come with their modules when first used: veRL takes seconds to import.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cme_reward._lazy import lazy

if TYPE_CHECKING:
    from cme_reward.verl.advantages import cme_grpo
    from cme_reward.verl.loop import CMEAgentLoopManager
    from cme_reward.verl.reward import CMEReward, compute_score

__all__ = ["CMEAgentLoopManager", "CMEReward", "cme_grpo", "compute_score"]

_HOMES = {
    "CMEAgentLoopManager": "loop",
    "CMEReward": "reward",
    "cme_grpo": "advantages",
    "compute_score": "reward",
}
_NEEDS = ("verl", "ray", "transfer_queue", "cachetools")


def _before() -> None:
    from cme_reward.verl.settings import check_version

    check_version()
    import_module("cme_reward.verl.plugin")  # whoever names the manager has the estimator, too


__getattr__ = lazy(__name__, _HOMES, needs=_NEEDS, extra="verl", before=_before)
