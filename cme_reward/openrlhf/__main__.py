"""`python -m cme_reward.openrlhf`: OpenRLHF's trainer, with per-token rewards."""

from cme_reward.openrlhf.launch import main

if __name__ == "__main__":
    main()
