"""Tokens, weights and FLOPs of each projector, and of a training step with it, counted without weights.

python tests/benchmarks/projectors.py
"""

import argparse
import json

from llava_twophase.projectors.build import ProjectorSpec, measure_projector
from llava_twophase.projectors.names import SHIPPED

# Qwen-VL's resampler, beside the default, which is Flamingo's.
QWEN_VL = {"queries": 256, "depth": 1, "positions": True}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", type=int, default=576, help="tokens of the tower (default: CLIP-L/14-336)")
    parser.add_argument("--tower_width", type=int, default=1024)
    parser.add_argument("--llm_width", type=int, default=4096, help="default: 7B")
    parser.add_argument("--llm_weights", type=float, default=6.6e9, help="matrix weights of the LLM (default: 7B)")
    parser.add_argument("--caption", type=int, default=20, help="caption tokens of a sample (default: 20)")
    args = parser.parse_args()
    cases = [("linear", {}), ("mlp2x_gelu", {}), *((kind, {}) for kind in SHIPPED), ("perceiver", QWEN_VL)]
    rows = []
    for kind, kwargs in cases:
        spec = ProjectorSpec(kind, args.patches, args.tower_width, args.llm_width, kwargs)
        size = measure_projector(spec)
        # The frozen LLM: 2 operations per weight and position forward, and 2 backward. The projector: 3 times its
        # forward pass, for its weights have gradients too.
        step = 4 * args.llm_weights * (size.tokens + args.caption) + 3 * size.flops
        rows.append(
            {
                "type": kind,
                "kwargs": kwargs,
                "tokens": size.tokens,
                "weights_million": round(size.parameters / 1e6, 1),
                "gflops_forward": round(size.flops / 1e9, 1),
                "tflops_step": round(step / 1e12, 2),
            }
        )
    print(f"{'type':16}{'tokens':>8}{'weights M':>12}{'GFLOPs':>10}{'step TFLOPs':>14}  kwargs")
    for row in rows:
        numbers = (
            f"{row['tokens']:8}{row['weights_million']:12.1f}{row['gflops_forward']:10.1f}{row['tflops_step']:14.2f}"
        )
        print(f"{row['type']:16}{numbers}  {json.dumps(row['kwargs']) if row['kwargs'] else ''}")
    print(json.dumps({"patches": args.patches, "llm_width": args.llm_width, "rows": rows}))


if __name__ == "__main__":
    main()
