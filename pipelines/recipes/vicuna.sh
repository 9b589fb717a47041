#!/usr/bin/env bash
# LLaVA-1.5's published stage 1 with Vicuna-13B, or -7B (MODEL=lmsys/vicuna-7b-v1.5), on 8 GPUs.
# Variables change the inputs below; arguments are added to the training command, where the last value of a flag counts.
# A second run, with another projector, learning rate or LLM, uses the same cache. CACHE=none trains on the fly.
set -euo pipefail

MODEL=${MODEL:-lmsys/vicuna-13b-v1.5}
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
CACHE=${CACHE:-caches/clip-l-336}                          # 658 GB for these 558,128 images, in bf16
OUTPUT=${OUTPUT:-checkpoints/$(basename "$MODEL")-pretrain}
REPORT_TO=${REPORT_TO:-none}                               # wandb and tensorboard are extras
EXTRACT_LAUNCHER=${EXTRACT_LAUNCHER:-torchrun --standalone --nproc_per_node gpu}
TRAIN_LAUNCHER=${TRAIN_LAUNCHER:-deepspeed}
PIPELINES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

features=(--image_folder "$IMAGES")
if [ "$CACHE" != none ]; then
    # Phase one: the frozen tower, once. LLaVA's tower runs in bf16 under --bf16 True.
    $EXTRACT_LAUNCHER "$PIPELINES/extract_features.py" \
        --data_path "$DATA" \
        --image_folder "$IMAGES" \
        --vision_tower "$TOWER" \
        --mm_vision_select_layer -2 \
        --compute_dtype bf16 \
        --feature_cache "$CACHE"
    features+=(--feature_cache "$CACHE")
fi

# Phase two: LLaVA's command, with --feature_cache, and a checkpoint of 0.4 GB at every 500 steps to resume from.
$TRAIN_LAUNCHER "$PIPELINES/train_projector.py" \
    --deepspeed "$PIPELINES/zero2.json" \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    "${features[@]}" \
    --vision_tower "$TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "$REPORT_TO" \
    "$@"
