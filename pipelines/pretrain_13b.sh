#!/usr/bin/env bash
# The published LLaVA-1.5 13B stage-1 recipe as two commands: extract the patch features once, train from them.
# Environment variables change the settings below: MODEL=lmsys/vicuna-7b-v1.5 OUTPUT=... bash pipelines/pretrain_13b.sh
# A second run with another learning rate, projector or LLM starts with phase two: the features are already in the cache.
set -euo pipefail

MODEL=${MODEL:-lmsys/vicuna-13b-v1.5}
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
CACHE=${CACHE:-./playground/data/LLaVA-Pretrain/features}    # 658 GB for the 558K set in bf16
OUTPUT=${OUTPUT:-./checkpoints/llava-v1.5-13b-pretrain}
REPORT_TO=${REPORT_TO:-wandb}                                # pip install llava-twophase[wandb]; or none

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Phase one: the frozen tower, once. LLaVA's tower runs in bf16 under --bf16 True.
python pipelines/extract_features.py \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --mm_vision_select_layer -2 \
    --compute_dtype bf16 \
    --feature_cache "$CACHE"

# Phase two: LLaVA's command, with --feature_cache.
deepspeed pipelines/train_projector.py \
    --deepspeed pipelines/zero2.json \
    --feature_cache "$CACHE" \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
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
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "$REPORT_TO"
