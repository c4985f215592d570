"""`python -m cme_reward.verl CONFIG.yaml [overrides]`: veRL's own trainer."""

from cme_reward.verl.launch import main

if __name__ == "__main__":
    raise SystemExit(main())
