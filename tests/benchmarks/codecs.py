"""Compare storage dtypes on the demo's task: size, error, and the loss of a projector trained on each.

    python -m pipelines.demo                     # once: makes demo-output/scenes, with a bf16 or fp32 cache
    python tests/benchmarks/codecs.py demo-output/scenes --output_dir codec-runs

The demo's cache is encoded again with each codec, and the demo's training command runs on each for every seed.
Everything else is equal, including the order of samples. The held-out loss is measured with the stored features, and
with the exact ones, which a model in use would get. Training is chaotic: before it has converged, runs that differ in
one bit diverge by more than the difference between codecs. The demo's own projector, trained on exact features, is
therefore also measured with the features of each codec; this difference has no noise. Finished runs are kept and are
not repeated. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llava_twophase import CacheWriter, FeatureCache
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.format import QUANTISED

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_twophase.deploy.captioner import Captioner
from llava_twophase.deploy.evaluate import caption_losses
from llava_twophase.records import load_records
from pipelines.demo.commands import PROJECTOR, ROOT
from pipelines.demo.run import RECIPES

SAMPLE = 128  # as phase one samples for its channel statistics
BATCH = 64


def encode_again(exact, storage, folder):
    """Write the features of an exact cache with another codec, with the same keys in each shard."""
    cache = Path(folder)
    if (cache / "manifest.json").exists():
        return FeatureCache(cache)
    keys, fingerprint, channels = list(exact.keys()), {**exact.fingerprint, "storage_dtype": storage}, None
    if storage in QUANTISED:
        picked = np.random.default_rng(0).choice(len(keys), min(SAMPLE, len(keys)), replace=False)
        channels = Channels.measure([exact.read_tensor([keys[row] for row in sorted(picked.tolist())])])
        fingerprint["channels"] = {"sha256": channels.sha256(), "images": len(picked), "seed": 0}
    sizes, digests = exact.column("source_size").tolist(), exact.column("source_sha256")
    per_shard = exact.manifest.images_per_shard
    with CacheWriter(cache, exact.feature_shape, storage, fingerprint, channels, per_shard) as writer:
        for start in range(0, len(keys), BATCH):
            features = exact.read_tensor(keys[start : start + BATCH])
            for row, (key, tensor) in enumerate(zip(keys[start : start + BATCH], features, strict=True), start):
                writer.add(key, tensor, source=(sizes[row], bytes(digests[row])))
    return FeatureCache(cache)


def error(exact, cache):
    """Return the relative error over all values, and the mean of 1 - cosine over tokens."""
    difference = total = angle = 0.0
    keys = list(exact.keys())
    for start in range(0, len(keys), BATCH):
        true = exact.read_tensor(keys[start : start + BATCH]).double()
        stored = cache.read_tensor(keys[start : start + BATCH]).double()
        difference, total = difference + float((stored - true).square().sum()), total + float(true.square().sum())
        angle += float((1 - torch.cosine_similarity(stored, true, dim=-1)).sum())
    return (difference / total) ** 0.5, angle / (len(keys) * exact.feature_shape[0])


def train(demo, cache, seed, folder, steps):
    """Run the demo's training command on a cache, unless its result exists."""
    if (folder / "mm_projector.bin").exists():
        return
    recipe, fingerprint = RECIPES["scenes"], cache.fingerprint
    llm = json.loads((demo / "projector" / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    bf16 = fingerprint["compute_dtype"] == "bfloat16"
    arguments = {
        "model_name_or_path": llm,
        "version": "plain",
        "data_path": demo / "train.json",
        "feature_cache": cache.path,
        "vision_tower": cache.manifest.provenance["vision_tower"],
        "mm_vision_select_layer": fingerprint["select_layer"],
        "mm_projector_type": PROJECTOR,
        "tune_mm_mlp_adapter": True,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "output_dir": folder,
        "per_device_train_batch_size": recipe.batch,
        "max_steps": steps or recipe.steps,
        "learning_rate": recipe.learning_rate,
        "weight_decay": 0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 20,
        "save_strategy": "no",
        "seed": seed,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "pipelines/train_projector.py", *words], cwd=ROOT, check=True, stdout=sys.stderr)


def held_out_loss(demo, cache, folder):
    """Return the loss of a trained projector on held-out records with a cache's features; it is kept in a file."""
    kept = folder / f"held_out_{cache.dtype}.json"
    if not kept.exists():
        captioner = Captioner.load(folder, feature_cache=cache.path)
        losses = []
        for record in load_records(demo / "held_out.json"):
            features = captioner.features([record.image])
            with torch.inference_mode():
                losses += caption_losses(captioner, [record.caption], features)[0]
        kept.write_text(json.dumps(sum(losses) / len(losses)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that the demo wrote for its scenes")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for caches and projectors, which are kept"
    )
    parser.add_argument("--codecs", nargs="+", default=["int8", "int4"], help="beside the demo's own (default: both)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3; 0: bytes and error alone)")
    parser.add_argument("--steps", type=int, help="of each run (default: the demo's)")
    args = parser.parse_args()
    demo, output = args.demo.absolute(), args.output_dir.absolute()
    exact = FeatureCache(demo / "cache")
    caches = {exact.dtype: exact}
    caches |= {storage: encode_again(exact, storage, output / storage / "cache") for storage in args.codecs}
    losses = {storage: {"stored": [], "exact": []} for storage in caches}
    for seed in range(args.seeds):
        for storage, cache in caches.items():
            folder = output / storage / f"seed-{seed}"
            train(demo, cache, seed, folder, args.steps)
            losses[storage]["stored"].append(held_out_loss(demo, cache, folder))
            losses[storage]["exact"].append(held_out_loss(demo, exact, folder))
            print(storage, seed, {kind: values[-1] for kind, values in losses[storage].items()}, file=sys.stderr)
    own = {storage: held_out_loss(demo, cache, demo / "projector") for storage, cache in caches.items()}
    report(exact, caches, losses, own)


def report(exact, caches, losses, own_loss):
    table = Table("storage", "bytes an image", "at 576 x 1024", "relative error", "1 - cos", box=None)
    table.add_column("demo's projector")
    for heading in ("held-out loss", "against exact", "with exact features", "against exact"):
        table.add_column(heading)
    line = {}
    for storage, cache in caches.items():
        relative, angle = (0.0, 0.0) if cache is exact else error(exact, cache)
        clip = {"bfloat16": 1179648, "float16": 1179648, "float32": 2359296, "int8": 590976, "int4": 331776}[storage]
        row = [storage, f"{cache.codec.row_bytes:,}", f"{clip / 1e6:.3f} MB", f"{relative:.4f}", f"{angle:.1e}"]
        change = own_loss[storage] / own_loss[exact.dtype] - 1
        row.append(f"{own_loss[storage]:.5f} {100 * change:+.2f} %")
        line[storage] = {
            "demo_projector_difference": round(change, 5),
            "row_bytes": cache.codec.row_bytes,
            "relative_error": round(relative, 5),
        }
        for kind, own in losses[storage].items() if losses[storage]["exact"] else ():
            ratios = [mine / theirs - 1 for mine, theirs in zip(own, losses[exact.dtype][kind], strict=True)]
            row += [f"{statistics.mean(own):.4f}", f"{100 * statistics.mean(ratios):+.2f} %"]
            line[storage][f"loss_{kind}"] = [round(loss, 5) for loss in own]
            line[storage][f"difference_{kind}"] = round(statistics.mean(ratios), 5)
        table.add_row(*row)
    Console(width=150).print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
