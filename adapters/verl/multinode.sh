#!/bin/sh
# The paper's run on the Ray cluster that this node is the head of:
#   head node:    ray start --head
#   other nodes:  ray start --address=HEAD:6379
# Data and this package have to be at the same place on all of them.
set -eu
exec python -m cme_reward.verl "$(dirname "$0")/multinode.yaml" \
    +ray_kwargs.ray_init.address=auto "$@"
