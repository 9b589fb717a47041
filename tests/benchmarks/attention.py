"""Speed of attention compared with matrix products on this machine: the part of both phases below the matmul rate.

    python tests/benchmarks/attention.py

For the tower (CLIP-L/14-336, two images) the forward pass of torch's fused attention, and of the same as explicit
products and a softmax, with their errors against float64. For the LLM (one micro-batch of
`tests/benchmarks/train_step.py`) the causal forward and backward pass. FLOPs of a causal kernel count half. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

DTYPE, HEAD = torch.bfloat16, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Samples, heads, positions.
TOWER = (2, 16, 577)
LLMS = {"135M": (4, 9, 599), "1.1B": (1, 32, 599)}


def seconds(call, repetitions):
    """Median time of a call, after one that warms up."""
    found = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def draw(shape, learning=False):
    samples, heads, positions = shape
    size = (samples, positions, heads, HEAD)
    return [torch.randn(size, device=DEVICE).to(DTYPE).transpose(1, 2).requires_grad_(learning) for _ in range(3)]


def explicit(query, key, value):
    return torch.softmax((query * HEAD**-0.5) @ key.transpose(2, 3), -1) @ value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15, help="the median counts (default: 15)")
    args = parser.parse_args()
    torch.manual_seed(0)
    square = torch.randn(2048, 2048, device=DEVICE).to(DTYPE)
    rate = 2 * 2048**3 / seconds(lambda: square @ square, args.repetitions)
    table = Table("attention", "ms", "of the matmul rate", "relative error", box=None)
    line = {"matmul_tflops": round(rate / 1e12, 4)}

    def report(name, flops, took, error=None):
        table.add_row(name, f"{1e3 * took:.1f}", f"{flops / took / rate:.2f}", "" if error is None else f"{error:.4f}")
        line[name] = {"ms": round(1e3 * took, 2), "of_matmul": round(flops / took / rate, 3), "error": error}

    parts = draw(TOWER)
    forward = 4 * TOWER[0] * TOWER[1] * TOWER[2] ** 2 * HEAD
    exact = scaled_dot_product_attention(*(part.double() for part in parts))
    for name, kernel in (("tower, fused", scaled_dot_product_attention), ("tower, explicit", explicit)):
        error = float((kernel(*parts).double() - exact).norm() / exact.norm())
        report(name, forward, seconds(lambda kernel=kernel: kernel(*parts), args.repetitions), round(error, 5))
    for llm, shape in LLMS.items():
        parts = draw(shape, learning=True)
        half = 2 * shape[0] * shape[1] * shape[2] ** 2 * HEAD

        def both(parts=parts):
            out = scaled_dot_product_attention(*parts, is_causal=True)
            torch.autograd.grad(out, parts, torch.ones_like(out))

        report(f"{llm}, causal, both passes", 3.5 * half, seconds(both, args.repetitions))
    Console(width=100).print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
