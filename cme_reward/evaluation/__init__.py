"""Which model answers better? Pairs of responses put before a judge, and what its verdicts say."""
