"""The extraction benchmark runs and prints the figures that the documentation quotes."""

import json

from helpers import run


def test_benchmark_prints_its_ratios(tmp_path):
    small = ["--layers", "2", "--images", "4", "--batch_size", "2", "--images_per_shard", "2", "--repetitions", "1"]
    done = run(["python", "tests/benchmarks/extract.py", *small, "--folder", tmp_path], timeout=500)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"pipeline_over_tower", "pipeline_over_llava", "tower_flops_over_matmul"} <= figures.keys()
    assert all(value > 0 for name, value in figures.items() if "_over_" in name)
