"""LLaVA's published stage-1 command as flags."""

import shlex

# LLaVA v1.5's published stage-1 command for 13B, its DeepSpeed config aside.
RECIPE = """
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images
    --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
    --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --bf16 True --output_dir {output} --num_train_epochs 1
    --per_device_train_batch_size 32 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 24000 --save_total_limit 1
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to none
"""
KNOWN_TO_LLAVA = """
    --mm_vision_select_feature patch --mm_patch_merge_type flat --image_aspect_ratio square
    --freeze_mm_mlp_adapter False
    --freeze_backbone True --group_by_modality_length False --bits 16 --double_quant True --quant_type nf4
    --is_multimodal True --lora_enable False --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --lora_weight_path ""
    --lora_bias none --mpt_attn_impl triton
"""


def recipe(output, *extra):
    """The published command with another output folder and further flags, on the CPU."""
    return [*shlex.split(RECIPE.format(output=output)), "--use_cpu", "True", *map(str, extra)]
