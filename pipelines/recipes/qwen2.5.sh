#!/usr/bin/env bash
# Stage 1 with Qwen2.5 on LLaVA-Pretrain: 0.5B by default, MODEL=Qwen/Qwen2.5-1.5B and others. All GPUs of this machine.
# Variables change the inputs below; arguments are added to the training command, where the last value of a flag counts.
# Features do not depend on the LLM: the cache of another LLM's run is used as it is.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B}
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
CACHE=${CACHE:-caches/clip-l-336}
OUTPUT=${OUTPUT:-checkpoints/$(basename "$MODEL")-pretrain}
REPORT_TO=${REPORT_TO:-none}
LAUNCHER=${LAUNCHER:-torchrun --standalone --nproc_per_node gpu}
PIPELINES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

$LAUNCHER "$PIPELINES/extract_features.py" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --compute_dtype bf16 \
    --feature_cache "$CACHE"

# 32 samples on each of 8 GPUs are LLaVA's batch of 256. With fewer GPUs, raise --gradient_accumulation_steps.
$LAUNCHER "$PIPELINES/train_projector.py" \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --feature_cache "$CACHE" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --model_max_length 2048 \
    --report_to "$REPORT_TO" \
    "$@"
