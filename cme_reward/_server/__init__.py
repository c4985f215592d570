"""What `cme_reward.server` is made of."""
