#!/bin/sh
# Train with per-token cross-model entropy; the paper's settings (arXiv 2605.29009, Appendix E).
# Flags given to this script go last and win: sh train.sh --actor.model_name_or_path my-model
#
# Four GPUs of one machine: two train, one generates, one holds the verifier. Needs OpenRLHF 0.11.
set -eu

# A verifier that is served already needs no GPU of ours: CME_VERIFIER=vllm:http://host:8000
: "${CME_VERIFIER:=hf:google/gemma-3-1b-it}"
# Rollouts of a step that cme-reward report shows.
: "${CME_SAMPLES:=4}"
export CME_VERIFIER CME_SAMPLES

# 5,000 prompts x 8 rollouts / 128 = 312 updates, of which the first 20 (0.0641) warm up.
exec python -m cme_reward.openrlhf \
    --actor.model_name_or_path Qwen/Qwen2.5-0.5B \
    --actor.num_nodes 1 \
    --actor.num_gpus_per_node 2 \
    --vllm.num_engines 1 \
    --vllm.tensor_parallel_size 1 \
    --data.prompt_dataset HuggingFaceH4/ultrafeedback_binarized \
    --data.prompt_split train_prefs \
    --data.input_key prompt \
    --data.apply_chat_template \
    --data.max_samples 5000 \
    --data.max_len 4096 \
    --rollout.max_new_tokens 2048 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.batch_size 16 \
    --rollout.micro_batch_size 8 \
    --rollout.temperature 1.0 \
    --rollout.top_p 1.0 \
    --train.batch_size 128 \
    --train.micro_batch_size 4 \
    --train.num_episodes 1 \
    --algo.advantage.estimator group_norm \
    --algo.kl.init_coef 0 \
    --actor.loss_agg_mode seq-mean-token-mean \
    --actor.eps_clip 0.2 \
    --actor.adam.lr 3e-6 \
    --actor.lr_scheduler cosine \
    --actor.lr_warmup_ratio 0.0641 \
    --actor.max_norm 1.0 \
    --ds.param_dtype bf16 \
    --ds.zero_stage 2 \
    --ckpt.output_dir cme-run \
    --ckpt.path cme-run/checkpoints \
    --logger.tensorboard_dir cme-run/tensorboard \
    "$@"
