#!/bin/sh
# The paper's run on one node. Arguments go to veRL, and as cme.KEY=VALUE to the reward.
set -eu
exec python -m cme_reward.verl "$(dirname "$0")/paper.yaml" "$@"
