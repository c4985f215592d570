#!/bin/sh
# The training as a Ray job, with OpenRLHF's own entry point: sh submit.sh [OpenRLHF's flags]
#
# The hook in the runtime environment is what carries per-token advantages into the trainer.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
: "${RAY_API_SERVER_ADDRESS:=http://127.0.0.1:8265}"
: "${CME_VERIFIER:=hf:google/gemma-3-1b-it}"
: "${CME_SAMPLES:=4}"
exec ray job submit --address="$RAY_API_SERVER_ADDRESS" --runtime-env-json="{
    \"worker_process_setup_hook\": \"cme_reward.openrlhf.install\",
    \"env_vars\": {\"CME_VERIFIER\": \"$CME_VERIFIER\", \"CME_SAMPLES\": \"$CME_SAMPLES\"}
}" -- python3 -m openrlhf.cli.train_ppo_ray --train.agent_func_path "$here/agent.py" "$@"
