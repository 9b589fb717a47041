"""Peak memory and time of `llava-use-projector export --to hf` by size of the LLM.

python tests/benchmarks/export.py --llm 13B [--folder DIR]

Writes an LLM folder of the given shape (twice the size of the LLM is needed on disk), exports it with a CLIP-L/14-336
tower in a process of its own, and reads that process's peak memory. The last line is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from llava_twophase.deploy.weights import SafetensorsWriter  # noqa: E402

# Peak memory of the process itself: ru_maxrss would include what this one had when it started the other.
CHILD = """
import re, sys
from llava_twophase.deploy.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""
# Width, MLP width, layers, heads: TinyLlama, Vicuna-7B and -13B.
SHAPES = {"1.1B": (2048, 5632, 22, 32), "7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}


def write_llm(folder, size):
    """Write a LLaMA in bfloat16, tensor by tensor."""
    width, inner, layers, heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )
    tiny.train_tokenizer(["a red circle"]).save_pretrained(folder)
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens": (32000, width), "lm_head": (32000, width), "model.norm": (width,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes.update({f"{prefix}.self_attn.{name}_proj": (width, width) for name in "qkvo"})
        shapes.update({f"{prefix}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")})
        shapes[f"{prefix}.mlp.down_proj"] = (width, inner)
        shapes.update({f"{prefix}.{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")})
    writer = SafetensorsWriter(folder, piece_bytes=10 << 30)  # files of 10 GB, as Vicuna-13B has them
    for name, shape in shapes.items():
        writer.add(f"{name}.weight", torch.full(shape, 0.01, dtype=torch.bfloat16))
    writer.close()
    return width


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", choices=tuple(SHAPES), default="1.1B")
    parser.add_argument("--folder", type=Path, help="where the models go (default: a temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        for name in ("llm", "tower"):
            (folder / name).mkdir()
        width = write_llm(folder / "llm", args.llm)
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14,
        )  # fmt: skip
        CLIPVisionModel(vision).to(torch.bfloat16).save_pretrained(folder / "tower")
        tiny.write_preprocessor(folder / "tower", tiny.CLIP_PREPROCESSOR)
        state = {"0.weight": (width, 1024), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
        projector = {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in state.items()}
        torch.save(projector, folder / "mm_projector.bin")
        command = [sys.executable, "-c", CHILD, "export", folder / "mm_projector.bin"]
        command += [folder / "out", "--to", "hf", "--model_name_or_path", folder / "llm", "--vision_tower"]
        started = time.perf_counter()
        done = subprocess.run(
            [*map(str, command), str(folder / "tower")], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - started
        peak = int(done.stdout.split()[-1]) * 1024 / 1e9
        size = sum(file.stat().st_size for file in (folder / "out").iterdir()) / 1e9
    finally:
        shutil.rmtree(folder)
    print(f"LLM {args.llm}: wrote {size:.1f} GB in {seconds:.0f} s, peak memory {peak:.2f} GB")
    print(
        json.dumps({"llm": args.llm, "gigabytes": round(size, 2), "seconds": round(seconds), "peak_gb": round(peak, 3)})
    )


if __name__ == "__main__":
    main()
