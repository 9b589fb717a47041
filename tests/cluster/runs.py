"""Jobs of the cluster tests: the recipes with small settings."""

import torch

from helpers import ROOT, fenced_blocks

RECIPES = ROOT / "pipelines" / "recipes" / "slurm"
EXTRACT_FLAGS = ["--device", "cpu", "--images_per_shard", "4", "--batch_size", "1", "--num_workers", "0"]
TRAIN_FLAGS = [
    "--use_cpu", "True", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4",
    "--max_steps", "120", "--logging_steps", "5", "--save_steps", "20", "--model_max_length", "512",
    "--dataloader_num_workers", "0",
]  # fmt: skip


def submit_training(slurm, inputs, output, **variables):
    """Submit the training recipe with small settings; return its `Job`."""
    return slurm.submit(RECIPES / "train.sbatch", arguments=TRAIN_FLAGS, **inputs.variables(OUTPUT=output, **variables))


def documented_script(word, inputs, output, replaced):
    """Return the script of docs/cluster.md that contains a word, with the models and settings of the other runs.

    `replaced` is a further text to replace, and its value.
    """
    blocks = fenced_blocks((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), "bash")
    (script,) = [block for block in blocks if word in block]
    values = {
        " pipelines/": f" {ROOT}/pipelines/",
        "lmsys/vicuna-13b-v1.5": inputs.llm,
        "records.json": inputs.records,
        "openai/clip-vit-large-patch14-336": inputs.tower,
        "caches/clip-l-336": inputs.cache,
        "checkpoints/run": output,
    }
    for text, value in [*values.items(), replaced]:
        assert text in script
        script = script.replace(text, str(value))
    schedule = "--warmup_ratio 0.03 --lr_scheduler_type cosine --gradient_checkpointing True"
    return f"cd {output.parent}; {script.rstrip()} {schedule} --report_to none {' '.join(TRAIN_FLAGS)}"


def assert_same_projector(one, other):
    """Assert that two runs ended with the same weights, bit for bit."""
    first, second = (torch.load(folder / "mm_projector.bin", weights_only=True) for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
