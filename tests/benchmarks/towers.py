"""Bytes per image of each family of vision towers, and the error of int8 and int4.

    python tests/benchmarks/towers.py                            # families with random weights
    python tests/benchmarks/towers.py --vision_tower FOLDER      # and a tower with real weights

A tower with random weights has the width and the patch size of a published model of its family, four layers, and crops
of eight by eight patches. Its features are those of layer -2 for drawn scenes. Bytes per image are computed for the
published model. Real weights say more: trained towers have outlier channels, which random ones do not have. The error
is the norm of the difference by the norm of the features, over all values. The last line is one JSON object.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import QUANTISED, row_bytes
from llava_twophase.vision.families import FAMILIES
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from docs_towers import STORAGES
from pipelines.demo.scenes import draw, random_scene
from vision import tiny_towers

GRID = 8
HEAD = 64  # channels of an attention head


def random_tower(model_type, published, folder):
    """Write a tower with random weights in the shape of a published model, and load it."""
    side = {"height": GRID * published.patch_size, "width": GRID * published.patch_size}
    shape = {
        "hidden_size": published.width,
        "intermediate_size": 4 * published.width,
        "mlp_ratio": 4 if "mlp_ratio" in tiny_towers.SHAPES.get(model_type, {}) else None,
        "num_attention_heads": published.width // HEAD,
        "image_size": side["height"],
        "patch_size": published.patch_size,
    }
    if shape["mlp_ratio"]:
        shape["intermediate_size"] = None
    tiny_towers.write(folder, model_type, **shape)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"size": {"shortest_edge": side["height"]}} if "shortest_edge" in settings["size"] else {"size": side}
    path.write_text(json.dumps({**settings, "crop_size": side}), encoding="utf-8")
    return VisionTower(str(folder), Preprocessor(str(folder)))


def errors(tower, images):
    """Return the relative error of each quantised storage dtype on the features of some images."""
    crops = [tower.preprocessor.crop(image) for image in images]
    features = tower.encode(torch.from_numpy(np.stack(crops)))
    found = {}
    for storage in QUANTISED:
        codec = Codec(storage, tower.feature_shape, Channels.measure([features]))
        difference = codec.from_rows(codec.to_rows(features)).double() - features.double()
        found[storage] = float(difference.norm() / features.double().norm())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_tower", help="folder or hub id of a tower with real weights")
    parser.add_argument("--mm_vision_select_layer", type=int, default=-2, help="its layer (default: -2)")
    parser.add_argument("--images", type=int, default=16, help="drawn scenes to encode (default: 16)")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), help="model types (default: all)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    drawing = random.Random(0)
    images = [draw(random_scene(drawing)) for _ in range(args.images)]
    rows = []
    if args.vision_tower is not None:
        tower = VisionTower(args.vision_tower, Preprocessor(args.vision_tower), args.mm_vision_select_layer)
        rows.append((Path(args.vision_tower).name, "real", tower.feature_shape, errors(tower, images)))
    for model_type in args.families:
        published = FAMILIES[model_type].published[0]
        with tempfile.TemporaryDirectory() as folder:
            found = errors(random_tower(model_type, published, Path(folder)), images)
        rows.append((published.name, "random", (published.grid**2, published.width), found))
    table = Table("tower", "weights", "features", *(f"{name}, MB" for name in STORAGES), "int8 error", "int4 error")
    result = []
    for name, weights, shape, found in rows:
        sizes = {storage: row_bytes(storage, shape) for storage in STORAGES}
        shown = [f"{size / 1e6:.3f}" for size in sizes.values()]
        percent = [f"{found[storage]:.2%}" for storage in QUANTISED]
        table.add_row(name, weights, f"{shape[0]} x {shape[1]}", *shown, *percent)
        result.append({"tower": name, "weights": weights, "features": shape, "bytes": sizes, "errors": found})
    Console(width=160).print(table)
    print(json.dumps({"images": args.images, "towers": result}))


if __name__ == "__main__":
    main()
