"""docs/scale.md: the page has the tables that its script computes, from figures that agree with the code."""

import re

import numpy as np
import pytest

import docs_scale
from helpers import run
from llava_twophase.cache.key_index import index_arrays


def test_page_has_the_tables_of_the_script():
    text = docs_scale.PAGE.read_text(encoding="utf-8")
    assert docs_scale.with_tables(text, docs_scale.Inputs()) == text, "run: python tests/docs_scale.py"


def test_script_with_other_inputs_prints_and_writes_nothing():
    before = docs_scale.PAGE.read_bytes()
    printed = run(
        ["python", "tests/docs_scale.py", "--gpu_hour_usd", "5", "--gpus", "16", "--images", "2000000"]
    ).stdout
    assert re.search(r"^\| 2M \| 16 \|", printed, re.MULTILINE)
    assert docs_scale.PAGE.read_bytes() == before


def test_money_follows_the_prices():
    inputs = docs_scale.Inputs(images=(1_000_000_000,))
    (row,) = docs_scale.money_table(inputs).splitlines()[2:]
    (twice,) = docs_scale.money_table(docs_scale.replace(inputs, gpu_hour_usd=5.0)).splitlines()[2:]

    def usd(line):
        return [float(cell.replace(",", "")) for cell in re.findall(r"([\d.,]+) USD", line)]

    assert usd(twice) == pytest.approx([2 * amount for amount in usd(row)[:3]] + usd(row)[3:], rel=1e-3)


def test_limit_of_an_extraction_is_the_slowest_part():
    def cells(**options):
        inputs = docs_scale.Inputs(images=(12_000_000,), gpus=(64,), **options)
        return docs_scale.extraction_table(inputs).splitlines()[2]

    assert "GPU |" in cells(shared_write_gb_s=1e6, node_write_gb_s=1e6)
    assert "decoding |" in cells(shared_write_gb_s=1e6, node_write_gb_s=1e6, cores_per_node=8)
    assert cells(shared_write_gb_s=1.0).count("disk |") == 2


@pytest.mark.parametrize("llm", docs_scale.STEP_TFLOP)
def test_operations_of_a_step_are_those_that_training_counts(llm):
    from llava_twophase.extract.break_even import SIZES
    from llava_twophase.train.loop.metrics import StepFlops

    hidden, inner, layers, heads, kv_heads = SIZES[llm]
    weights = layers * (2 * hidden * hidden * (1 + kv_heads // heads) + 3 * hidden * inner)
    operations = StepFlops(weights, 0, layers * hidden).count(1, docs_scale.SHAPE[0] + 15, 0)
    assert docs_scale.STEP_TFLOP[llm] == pytest.approx(operations / 1e12, rel=1e-5)


def test_index_has_the_measured_bytes_per_image():
    # Keys of 19 bytes, as the benchmark's.
    keys = [f"{row // 1000:05d}/{row:09d}.jpg".encode() for row in range(2048)]
    hashes = bytearray(np.arange(len(keys), dtype=np.uint64).tobytes())
    arrays = index_arrays(bytearray(b"".join(keys)), [19, 19], [1024, 1024], hashes)
    size = sum(array.nbytes for array in arrays.values()) + 8 * len(keys)
    assert size / len(keys) == pytest.approx(docs_scale.value("index_bytes"), rel=0.02)
