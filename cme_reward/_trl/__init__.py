"""What `cme_reward.trl` is made of."""
