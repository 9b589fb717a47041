#!/usr/bin/env bash
# Compare projectors on one cache: one run each, then a table of their losses, a plot, and an evaluation on held-out
# records. Without variables it uses what `make demo` left, which takes some minutes on a CPU: give --use_cpu True.
# Variables change the inputs below; arguments are added to the training commands, where the last value of a flag counts.
# PROJECTORS may have package.module:ClassName too. KWARGS_<type> holds --mm_projector_kwargs of a type, with an underscore
# for each character that is not a letter or a digit: KWARGS_perceiver='{"queries": 32}'.
set -euo pipefail

PROJECTORS=${PROJECTORS:-mlp2x_gelu avgpool_mlp pixel_shuffle ldpv2 c_abstractor perceiver}
MODELS=${XDG_CACHE_HOME:-$HOME/.cache}/llava-twophase/models
MODEL=${MODEL:-$MODELS/smollm2-135m-b179c952}
TOWER=${TOWER:-$MODELS/dinov2-small-56px-198644e3}
LAYER=${LAYER:--7}
DATA=${DATA:-demo-output/scenes/train.json}
HELD_OUT=${HELD_OUT:-demo-output/scenes/held_out.json}     # records that no run is trained on
IMAGES=${IMAGES:-demo-output/scenes/images}
CACHE=${CACHE:-demo-output/scenes/cache}
RUNS=${RUNS:-runs}
STEPS=${STEPS:-200}
LAUNCHER=${LAUNCHER:-python}
PIPELINES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

for records in "$DATA" "$HELD_OUT"; do
    $LAUNCHER "$PIPELINES/extract_features.py" \
        --data_path "$records" \
        --image_folder "$IMAGES" \
        --vision_tower "$TOWER" \
        --mm_vision_select_layer "$LAYER" \
        --compute_dtype bf16 \
        --feature_cache "$CACHE"
done

folders=()
for projector in $PROJECTORS; do
    kwargs=KWARGS_${projector//[^a-zA-Z0-9]/_}
    given=()
    if [ -n "${!kwargs:-}" ]; then given=(--mm_projector_kwargs "${!kwargs}"); fi
    $LAUNCHER "$PIPELINES/train_projector.py" \
        --model_name_or_path "$MODEL" \
        --version plain \
        --data_path "$DATA" \
        --eval_data_path "$HELD_OUT" \
        --image_folder "$IMAGES" \
        --vision_tower "$TOWER" \
        --mm_vision_select_layer "$LAYER" \
        --feature_cache "$CACHE" \
        --mm_projector_type "$projector" "${given[@]}" \
        --tune_mm_mlp_adapter True \
        --bf16 True \
        --output_dir "$RUNS/$projector" \
        --max_steps "$STEPS" \
        --per_device_train_batch_size 4 \
        --eval_strategy steps \
        --eval_steps 0.5 \
        --save_strategy steps \
        --save_steps 0.5 \
        --save_total_limit 1 \
        --learning_rate 1e-3 \
        --warmup_ratio 0.03 \
        --lr_scheduler_type cosine \
        --logging_steps 5 \
        --report_to none \
        "$@"
    folders+=("$RUNS/$projector")
done

python "$PIPELINES/compare_runs.py" "${folders[@]}" --plot "$RUNS/losses.png"
python "$PIPELINES/use_projector.py" evaluate "${folders[@]}" \
    --data_path "$HELD_OUT" \
    --feature_cache "$CACHE" \
    --image_folder "$IMAGES" \
    --html "$RUNS/evaluation.html"
