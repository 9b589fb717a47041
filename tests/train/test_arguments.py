"""LLaVA's command line."""

import json
import shlex

import pytest

from helpers import ROOT
from llava_twophase.errors import UserError
from llava_twophase.train.arguments import parse_arguments

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


@pytest.fixture
def parse(tmp_path):
    def parse(*extra):
        return parse_arguments([*shlex.split(RECIPE.format(output=tmp_path / "out")), "--use_cpu", "True", *extra])

    return parse


def test_published_recipe_is_accepted_and_means_what_it_says(parse):
    arguments = parse()
    training = arguments.training
    assert arguments.model.mm_vision_select_layer == -2
    assert arguments.model.mm_projector_type == "mlp2x_gelu"
    assert training.bf16 and training.activation_checkpointing
    assert training.eval_strategy.value == "no"
    assert training.get_warmup_steps(1000) == 30
    assert training.get_warmup_steps(1001) == 31  # ceil, as LLaVA
    assert training.learning_rate == 1e-3
    assert training.optim.value == "adamw_torch"
    assert not training.remove_unused_columns


def test_what_else_llavas_parser_knows_is_accepted(parse):
    assert parse(*shlex.split(KNOWN_TO_LLAVA)).training.bits == 16


def test_false_means_false(parse):
    assert parse("--bf16", "False").training.bf16 is False


def test_projector_learning_rate_overrides(parse):
    assert parse("--mm_projector_lr", "2e-5").training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tune_mm_mlp_adapter", "False"], "--tune_mm_mlp_adapter must be True"),
        (["--freeze_mm_mlp_adapter", "True"], "--freeze_mm_mlp_adapter"),
        (["--lora_enable", "True"], "--lora_enable"),
        (["--bits", "5"], "--bits 5"),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy: the order of samples is LLaVA's"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha"),
        (["--fsdp", "full_shard"], "--fsdp: to spread the LLM"),
        (["--push_to_hub", "True"], "--push_to_hub True"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--learning_rate", "-1"], "--learning_rate -1"),
        (["--warmup_ratio", "1"], "--warmup_ratio 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0: expected more than 0"),
        (["--save_only_model", "True"], "--save_only_model True"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end"),
        (["--mm_use_im_patch_token", "True"], "--mm_use_im_patch_token"),
        (["--mm_patch_merge_type", "spatial"], "--mm_patch_merge_type spatial"),
        (["--version", "plian"], "templates are: plain"),
        (["--compute_dtype", "float16"], "--compute_dtype float16"),
    ],
)
def test_what_stage_one_cannot_honour_is_refused_by_name(parse, flags, named):
    with pytest.raises(UserError, match=named):
        parse(*flags)


def test_all_refusals_come_together(parse):
    with pytest.raises(UserError) as caught:
        parse("--lora_enable", "True", "--version", "v1", "--bits", "3")
    assert all(flag in str(caught.value) for flag in ("--lora_enable", "--version", "--bits"))


def test_tower_dtype_follows_llava(parse):
    import torch

    assert parse().tower_dtype == torch.bfloat16
    assert parse("--bf16", "False").tower_dtype == torch.float16
    assert parse("--bf16", "False", "--compute_dtype", "fp32").tower_dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_optimization": {"stage": 0}}, "gradients add up in float32 in ZeRO stages 1 to 3 alone"),
        (
            {"train_micro_batch_size_per_gpu": 7},
            "ds train_micro_batch_size_per_gpu=7 vs hf per_device_train_batch_size=32",
        ),
        ({"bf16": {"enabled": False}}, "ds bf16.enabled=False"),
    ],
)
def test_a_deepspeed_config_that_says_otherwise_is_refused(parse, tmp_path, changes, named):
    config = json.loads((ROOT / "pipelines" / "zero2.json").read_text(encoding="utf-8")) | changes
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=named):
        parse("--deepspeed", str(path))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="--deepspeed, or another flag that takes JSON, is no valid JSON"):
        parse("--deepspeed", str(path))
    with pytest.raises(UserError, match="nowhere"):
        parse("--deepspeed", str(tmp_path / "nowhere.json"))
