#!/usr/bin/env bash
# Stage 1 on one GPU with 24 GB: Vicuna-7B in bf16, or MODEL=lmsys/vicuna-13b-v1.5 BITS=4 (pip install bitsandbytes).
# Variables change the inputs below; arguments are added to the training command, where the last value of a flag counts.
# STORAGE=int8 halves the cache: 330 GB instead of 658 GB, with rounded features (docs/format.md).
set -euo pipefail

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
BITS=${BITS:-16}
STORAGE=${STORAGE:-auto}
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
CACHE=${CACHE:-caches/clip-l-336}
OUTPUT=${OUTPUT:-checkpoints/$(basename "$MODEL")-$BITS-bit-pretrain}
REPORT_TO=${REPORT_TO:-none}
PIPELINES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python "$PIPELINES/extract_features.py" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --compute_dtype bf16 \
    --storage_dtype "$STORAGE" \
    --feature_cache "$CACHE"

# Batches of 8, accumulated over 32 steps, are LLaVA's batch of 256 and give the same loss. Within a batch of 8, the
# micro-batch follows from the free memory.
python "$PIPELINES/train_projector.py" \
    --model_name_or_path "$MODEL" \
    --bits "$BITS" \
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
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 32 \
    --save_strategy steps \
    --save_steps 100 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --report_to "$REPORT_TO" \
    "$@"
