"""What `cme_reward.openrlhf` is made of. Imports nothing: Ray runs `install` in every worker."""
