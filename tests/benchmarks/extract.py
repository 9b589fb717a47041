"""Speed of phase one compared with the tower alone and with LLaVA's way.

    python tests/benchmarks/extract.py                  # full-size CLIP-L/14-336 in bf16; half an hour on two CPU cores
    python tests/benchmarks/extract.py --layers 3       # the same with a shorter tower, in minutes

Every repetition runs in turn, with the same weights, dtype, images and threads:

(tower)     our tower alone, on crops that are ready
(pipeline)  complete phase one: JPEG files to sealed, synced shards, including the start of worker processes
(llava)     LLaVA's way: its processor for each image, the complete tower with output_hidden_states, in one loop
(matmul)    the machine's rate for a bf16 product of two 2048 x 2048 matrices, 8192 x 8192 on a GPU

Ratios are medians of the repetitions' own ratios, so that other load on the machine affects both sides. Weights are
random: speed does not depend on them. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.extract.pipeline import Options, extract
from llava_twophase.extract.plan import ShardWork
from llava_twophase.extract.timings import Timings
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import ImageFolder
from llava_twophase.vision.tower import VisionTower

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE, PATCH, WIDTH, INNER, HEADS = 336, 14, 1024, 4096, 16
SQUARE = 8192 if DEVICE.type == "cuda" else 2048
TOKENS = (SIDE // PATCH) ** 2 + 1
PROCESSOR = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": SIDE},
}


def write_tower(folder, layers):
    """CLIP-L/14-336's vision tower with random weights and `layers` of its 24 layers."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    CLIPVisionModel._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")


def write_pictures(folder, count):
    """JPEGs like those of LLaVA-Pretrain: about 60 KB, 500 by 375 pixels, detail on every scale."""
    rng = np.random.default_rng(0)
    keys = []
    for number in range(count):
        scales = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for size in (3, 12, 50)]
        layers = [np.asarray(scale.resize((500, 375), Image.Resampling.BICUBIC), np.float32) for scale in scales]
        picture = Image.fromarray((sum(layers) / len(layers)).astype(np.uint8))
        keys.append(f"{number:06d}.jpg")
        picture.save(folder / keys[-1], quality=90)
    return keys


def repeat_pictures(folder, keys, count):
    """Link the pictures under more names until there are `count` of them, and return the new names."""
    names = [f"{number:06d}.jpg" for number in range(len(keys), count)]
    for number, name in enumerate(names):
        os.link(folder / keys[number % len(keys)], folder / name)
    return names


def flops(layers):
    """Multiplications and additions of one image in `layers` layers and the patch embedding."""
    linear = 2 * TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    attention = 4 * TOKENS * TOKENS * WIDTH
    return layers * (linear + attention) + 2 * (TOKENS - 1) * WIDTH * 3 * PATCH * PATCH


class Ways:
    """The four parts of a repetition; each returns a rate: images/s, or FLOP/s for the product."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        (folder / "images").mkdir()
        self.sample = write_pictures(folder / "images", min(args.images, args.sample or args.images))
        self.keys = [*self.sample, *repeat_pictures(folder / "images", self.sample, args.images)]
        write_tower(folder, args.layers)
        self.images, self.preprocessor = ImageFolder(folder / "images"), Preprocessor(str(folder))
        self.ours = VisionTower(str(folder), self.preprocessor, dtype=torch.bfloat16, device=DEVICE)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        complete = CLIPVisionModel.from_pretrained(folder, dtype=torch.bfloat16)
        self.complete = complete.eval().requires_grad_(False).to(DEVICE)
        pictures = [Image.open(folder / "images" / key).convert("RGB") for key in self.sample]
        self.crops = torch.from_numpy(np.stack([self.preprocessor.crop(picture) for picture in pictures]))
        self.matrix = torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device=DEVICE)
        self.rss = []
        self.runs = 0
        self.timings = Timings()

    def tower(self):
        started = now()
        for crops in self.crops.split(self.args.batch_size):
            self.ours.encode(crops)
        return len(self.sample) / (now() - started)

    def pipeline(self):
        self.runs += 1
        cache = self.folder / f"cache-{self.runs}"
        (cache / "shards").mkdir(parents=True)
        spec = ShardSpec(self.ours.feature_shape, "bfloat16", {"made": "extract.py"}, {})
        size = self.args.images_per_shard
        work = [ShardWork(i, self.keys[start : start + size]) for i, start in enumerate(range(0, len(self.keys), size))]
        options = Options(self.args.batch_size, self.args.num_workers)
        self.timings, rss = Timings(), []
        started = time.perf_counter()
        for _ in extract(cache, work, self.images, self.ours, spec, options, self.timings):
            rss.append(resident_bytes())
        seconds = time.perf_counter() - started
        self.rss.append(rss)
        for shard in (cache / "shards").iterdir():
            shard.unlink()
        return len(self.keys) / seconds

    @torch.inference_mode()
    def llava(self):
        started = now()
        for start in range(0, len(self.sample), self.args.batch_size):
            pixels = []
            for key in self.sample[start : start + self.args.batch_size]:
                picture = Image.open(self.folder / "images" / key).convert("RGB")
                pixels.append(self.processor.preprocess(picture, return_tensors="pt")["pixel_values"][0])
            batch = torch.stack(pixels).to(DEVICE, torch.bfloat16)
            self.complete(batch, output_hidden_states=True).hidden_states[-2][:, 1:].cpu()
        return len(self.sample) / (now() - started)

    @torch.inference_mode()
    def matmul(self):
        started, count = now(), 0
        while now() - started < 1:
            self.matrix @ self.matrix
            count += 1
        return count * 2 * SQUARE**3 / (now() - started)


def now():
    """Seconds of a clock that waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_bytes():
    """This process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(ways, repetitions):
    """Rates of each part, one list each; the order rotates from one repetition to the next."""
    names = ("tower", "pipeline", "llava", "matmul")
    rates = {name: [] for name in names}
    ways.ours.encode(ways.crops[: ways.args.batch_size])  # one-time set-up
    for repetition in range(repetitions):
        for place in range(len(names)):
            name = names[(place + repetition) % len(names)]
            rates[name].append(getattr(ways, name)())
            print(f"{repetition + 1}/{repetitions} {name} {rates[name][-1]:.4g}", file=sys.stderr, flush=True)
    return rates


def summary(ways, rates, args):
    """All figures, as one dict."""
    depth = args.layers - 1  # select_layer -2

    def ratio(one, other, factor=1.0):
        return statistics.median(factor * a / b for a, b in zip(rates[one], rates[other], strict=True))

    growth = max((later[-1] - later[len(later) // 2]) for later in ways.rss) if ways.rss else 0
    return {
        "pipeline_over_tower": round(ratio("pipeline", "tower"), 4),
        "pipeline_over_llava": round(ratio("pipeline", "llava"), 4),
        "tower_flops_over_matmul": round(ratio("tower", "matmul", flops(depth)), 4),
        "llava_flops_over_matmul": round(ratio("llava", "matmul", flops(args.layers)), 4),
        "tower_images_per_second": round(statistics.median(rates["tower"]), 4),
        "pipeline_images_per_second": round(statistics.median(rates["pipeline"]), 4),
        "llava_images_per_second": round(statistics.median(rates["llava"]), 4),
        "matmul_tflops": round(statistics.median(rates["matmul"]) / 1e12, 4),
        "rss_growth_mb_second_half": round(growth / 1e6, 1),
        "bound_by": ways.timings.bound_by(),
        "pipeline_seconds": {
            field.name: round(getattr(ways.timings, field.name), 3)
            for field in dataclasses.fields(ways.timings)
            if field.name != "cpu"
        },
        **{name: getattr(args, name) for name in ("layers", "images", "sample", "batch_size")},
        **{name: getattr(args, name) for name in ("num_workers", "repetitions")},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="layers of the tower (default: 24, CLIP-L)")
    parser.add_argument("--images", type=int, default=32, help="pictures of one repetition (default: 32)")
    parser.add_argument("--sample", type=int, help="pictures of the tower's and LLaVA's parts (default: all)")
    parser.add_argument("--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default: 8)")
    parser.add_argument("--num_workers", type=int, default=1, help="decoding processes (default: 1)")
    parser.add_argument("--images_per_shard", type=int, default=16, help="(default: 16)")
    parser.add_argument("--folder", help="where to write the tower, pictures and shards; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ways = Ways(args, Path(folder))
        rates = measure(ways, args.repetitions)
    figures = summary(ways, rates, args)
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console(stderr=True).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
