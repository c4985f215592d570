#!/bin/sh
# The same with one reward per response (Eq. 3 of the paper), through OpenRLHF's own interface.
#
# The reward is computed in the rollout processes. To have servers compute it instead, start them
# (cme-reward serve) and give --reward.remote_url http://a:8000/get_reward,http://b:8000/get_reward.
set -eu
cd "$(dirname "$0")"
# Rollouts are kept with per-token rewards alone.
export CME_SAMPLES=0
exec sh ./train.sh --reward.remote_url "$PWD/reward_func.py" "$@"
