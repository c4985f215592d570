"""What veRL's plugin entry point loads, in every process: it registers the estimator."""

import cme_reward.verl.advantages  # noqa: F401
