"""The golden models' weights by rule: integers times a power of two, exact in fp16, bf16 and fp32."""

import zlib

import numpy as np


def tensor(name, shape, seed):
    """The weight called `name`, float32."""
    draws = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)  # numpy's frozen legacy generator
    if name.endswith("weight") and len(shape) == 1:
        return (1 + draws.randint(-16, 17, size=shape) / 64).astype(np.float32)
    exponent = 6 if name.endswith("embed_tokens.weight") else 9 if name.endswith("bias") else 7
    count = int(np.prod(shape))
    total = sum(draws.randint(-16, 17, size=count).astype(np.int64) for _ in range(4))
    return (total.reshape(shape) * 2.0**-exponent).astype(np.float32)


def projector(kind, width, hidden_size):
    """The fixed projector init, by file name of the weight."""
    if kind == "linear":
        shapes = {"weight": ("p.weight", (hidden_size, width)), "bias": ("p.bias", (hidden_size,))}
    else:
        shapes = {}
        for layer in range(int(kind[3])):
            columns = width if layer == 0 else hidden_size
            shapes[f"{2 * layer}.weight"] = (f"p.{layer}.weight", (hidden_size, columns))
            shapes[f"{2 * layer}.bias"] = (f"p.{layer}.bias", (hidden_size,))
    return {f"model.mm_projector.{name}": tensor(*drawn, seed=7) for name, drawn in shapes.items()}
