"""What `cme_reward.verl` is made of."""
