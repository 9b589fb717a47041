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


def test_price_of_an_extraction_pays_for_gpus_that_wait_for_the_disk():
    inputs = docs_scale.Inputs(images=(1_000_000_000,), gpus=(64,))

    def prices(**options):
        cells = docs_scale.extraction_table(docs_scale.replace(inputs, **options)).splitlines()[2].split(" | ")
        return [float(cell.strip(" |USD").replace(",", "")) for cell in cells[-2:]]

    alone = 1e9 / inputs.images_per_second / 3600 * inputs.gpu_hour_usd
    assert prices(shared_write_gb_s=1e6, node_write_gb_s=1e6) == pytest.approx([alone, alone], rel=1e-3)
    seconds = 1e9 * docs_scale.bytes_of("bf16") / 40e9
    assert prices() == pytest.approx([seconds / 3600 * 64 * 2.5, alone], rel=1e-3)


def test_reading_from_object_storage_pays_for_requests_and_egress():
    inputs = docs_scale.Inputs(images=(1_000_000_000,), egress_gb_usd=0.1)
    (row,) = docs_scale.money_table(inputs).splitlines()[2:]
    rows, start = (float(cell.replace(",", "")) for cell in re.findall(r"([\d.,]+) USD", row)[-2:])
    assert rows == pytest.approx(400 + 0.1 * docs_scale.bytes_of("bf16"), rel=1e-3)
    assert start == pytest.approx(512 * 976_563 * 2 * 0.4 / 1e6, rel=1e-3)


def test_opening_has_the_measured_times_and_a_range_beyond_them():
    assert docs_scale.opening("first", 20_000_000) == "4.9 s"
    assert docs_scale.opening("first", 100_000_000) == "62.0 s"
    assert docs_scale.opening("first", 60_000_000) == "33.5 s"
    # 62 s / 4.9 s for 5 times the images is a power of 1.577.
    assert docs_scale.opening("first", 500_000_000) == "5.2 min to 13.1 min"


def test_memory_that_is_not_shared_is_never_less_than_shared_memory():
    inputs = docs_scale.Inputs(images=(558_128,))
    cells = docs_scale.memory_table(inputs).splitlines()[2].split(" | ")
    assert cells[3] == cells[4]


def test_page_compares_storage_with_the_prices_of_its_tables():
    text, inputs = docs_scale.PAGE.read_text(encoding="utf-8"), docs_scale.Inputs(images=(1_000_000_000,))
    month = 1e9 * docs_scale.bytes_of("bf16") / 1e9 * inputs.object_gb_month_usd
    lines = docs_scale.extraction_table(inputs).splitlines()[2:]
    prices = [float(line.split(" | ")[-2].removesuffix(" USD").replace(",", "")) for line in lines]
    alone = 1e9 / inputs.images_per_second / 3600 * inputs.gpu_hour_usd
    assert f"{month / max(prices):.0f} to {month / min(prices):.0f} times the extraction" in text
    assert f"up to {max(prices) / alone:.1f} times as much" in text


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
