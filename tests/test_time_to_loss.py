"""The parts of tests/benchmarks/time_to_loss.py: tokens, optimizers, FLOPs, predictions, and that results are kept."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT
from llava_twophase.projectors.mlp import build_mlp
from llava_twophase.train.data.collator import collate
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from train.model.llms import build_llm

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import time_to_loss
from loss_data import BACKGROUNDS, COLOURS, PLACES, RELATIONS, Split, draw_rich_scene
from loss_report import flops_to_loss, mean_and_interval, predict_final, summarize
from loss_runs import Recipe, Run, claimed, finish, read_records, train_projector, with_changes
from loss_ways import WAYS, SampleFlops, ScheduleFree, muon_flops, patch_positions, pool, random_subset, ridge_start

TOKENS, WIDTH = 16, 24


def draw_split(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.tensor([-200, *torch.randint(3, 128, (4 + row % 3,), generator=generator)]) for row in range(size)]
    labels = [torch.where(row < 0, -100, row) for row in ids]
    return Split(torch.randn(size, TOKENS, WIDTH, generator=generator).bfloat16(), ids, labels)


def short_run(way, seed=0, **changes):
    return with_changes(Run("scenes", way, seed, Recipe(steps=5, batch=4, learning_rate=1e-2), WAYS[way]), changes)


def test_pool_averages_neighbours_of_the_grid_row_by_row():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).view(1, 16, 2)
    assert pool(grid)[0].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_random_subset_keeps_the_order_of_patches_and_differs_by_draw():
    generator = torch.Generator().manual_seed(0)
    draws = [random_subset(64, 16, generator).tolist() for _ in range(3)]
    assert all(draw == sorted(set(draw)) and len(draw) == 16 for draw in draws) and draws[0] != draws[1]


@pytest.mark.parametrize("image_position", [0, 1])
def test_patch_positions_are_those_of_the_complete_image(image_position):
    llm, seen = build_llm(), []
    llm.model.rotary_emb.register_forward_hook(
        lambda module, arguments, options, result: seen.append(options["position_ids"][0].tolist()), with_kwargs=True
    )
    embeds = torch.randn(2, image_position + 3 + 4, 64)
    with patch_positions(llm, image_position, torch.tensor([2, 5, 11]), tokens=TOKENS):
        subset = llm(inputs_embeds=embeds).logits
    contiguous = llm(inputs_embeds=embeds).logits
    image = [image_position + patch for patch in (2, 5, 11)]
    assert seen[0] == [*range(image_position), *image, *range(image_position + 16, image_position + 20)]
    assert seen[1] == list(range(image_position + 7))  # the hook is gone
    # Attention still reaches every earlier token: only positions differ, so the first token's output is the same.
    assert not torch.allclose(subset[:, -1], contiguous[:, -1], atol=1e-4)
    with patch_positions(llm, image_position, torch.arange(3), tokens=3):
        assert torch.equal(llm(inputs_embeds=embeds).logits, contiguous)


def test_flops_of_a_sample_are_what_the_step_computes():
    llm = build_llm(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, num_key_value_heads=2)
    model = LlavaProjectorModel(FrozenLLM(LoadedLLM(llm), 0, 1, 0), build_mlp("mlp2x_gelu", WIDTH, 256))
    split = draw_split(1)
    with FlopCounterMode(display=False) as counter:
        model(**collate(split.samples([0])))["loss"].backward()
    counted = SampleFlops(llm, WIDTH).step(TOKENS, len(split.input_ids[0]), image_position=0)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_ridge_start_finds_targets_that_the_second_layer_can_reach():
    torch.manual_seed(0)
    features = torch.randn(200, TOKENS, WIDTH)
    truth, fitted = build_mlp("mlp2x_gelu", WIDTH, 32), build_mlp("mlp2x_gelu", WIDTH, 32)
    fitted[0].load_state_dict(truth[0].state_dict())
    with torch.no_grad():
        targets = truth(features).mean(1)
        before = (fitted(features).mean(1) - targets).square().mean()
        ridge_start(fitted, features, targets)
        after = (fitted(features).mean(1) - targets).square().mean()
    assert after < 1e-4 * before


def test_schedule_free_evaluates_the_mean_of_its_steps():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = ScheduleFree([weight], rate=0.1, warmup=0)
    for _ in range(3):  # a constant gradient: each step of z is the learning rate
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == pytest.approx(0.1 * -0.3 + 0.9 * -0.2, abs=1e-5)  # y, between z and x
    optimizer.use("x")
    assert weight.item() == pytest.approx(-(0.1 + 0.2 + 0.3) / 3, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_train_projector_learns_and_counts_in_every_way(way):
    llm, train = build_llm(), draw_split(20)
    record = train_projector(short_run(way), llm, train, draw_split(6, seed=1))
    again = train_projector(short_run(way), llm, train, draw_split(6, seed=1))
    baseline = train_projector(short_run("baseline"), llm, train, draw_split(6, seed=1))
    assert record["curve"] == again["curve"] and record["final"] == record["curve"][-1][2]
    assert len(record["train_losses"]) == (3 if WAYS[way].duration < 1 else 5)
    assert (record["tflop"] < baseline["tflop"]) == (way != "baseline")
    assert (record["final"] != baseline["final"]) == (way != "baseline")


def test_finish_runs_what_is_missing_and_unclaimed_only(tmp_path):
    class Bench:
        def __init__(self):
            self.seeds = []

        def run(self, run):
            self.seeds.append(run.seed)
            return {"seed": run.seed, "settings": run.settings()}

    runs, bench = [short_run("baseline", seed) for seed in range(4)], Bench()
    assert [record["seed"] for record in finish(runs[:2], bench, tmp_path)] == [0, 1]
    with claimed(runs[2].path(tmp_path)) as mine:
        assert mine and [record["seed"] for record in finish(runs, bench, tmp_path)] == [3]
    other = short_run("baseline", learning_rate=0.5)
    assert [record["settings"]["learning_rate"] for record in finish([*runs, other], bench, tmp_path)] == [1e-2, 0.5]
    assert bench.seeds == [0, 1, 3, 2, 0] and len(read_records(tmp_path)) == 5
    assert json.loads(other.path(tmp_path).read_text(encoding="utf-8"))["settings"] == other.settings()


def test_predict_final_extrapolates_a_power_law_from_its_first_fifth():
    losses = [1.5 + 2.0 / step**0.5 for step in range(1, 201)]
    last = sum(losses[180:]) / 20
    assert predict_final(losses) == pytest.approx(last, rel=0.01)
    assert predict_final([*losses[:40], *[9.0] * 160]) == predict_final(losses)  # the rest is not seen


def test_summary_compares_with_the_mean_of_the_baseline():
    def record(way, seed, tflop, curve):
        return {"way": way, "seed": seed, "tflop": tflop, "final": curve[-1][2], "curve": curve}

    baseline = [record("baseline", seed, 10.0, [[8, 5.0, 3.0], [16, 10.0, 2.0 + 0.1 * seed]]) for seed in (-1, 0, 1)]
    good, bad = ([[8, 3.0, 2.0059], [16, 6.0, 1.9]], [[8, 3.0, 2.5], [16, 6.0, 2.1]])
    found = summarize([*baseline, record("muon", 0, 6.0, good), record("muon", 1, 6.0, bad)])["muon"]
    assert (found["difference"], found["share"]) == (0.0, 0.6)
    assert (found["reached"], found["share_to_loss"]) == (1, 0.3)
    assert found["spread"] == pytest.approx((bad[-1][2] - good[-1][2]) / found["mean"], abs=1e-4)
    assert mean_and_interval([1.9, 2.1]) == (2.0, None)
    assert mean_and_interval([1.9, 2.0, 2.1]) == (2.0, pytest.approx(4.303 * 0.1 / 3**0.5))
    assert flops_to_loss(bad, 2.0) is None and summarize([baseline[0] | {"way": "muon"}]) == {}


def test_flops_of_muon_are_those_of_its_matrix_products():
    weight = torch.nn.Parameter(torch.randn(48, 20))
    weight.grad = torch.randn(48, 20)
    optimizer = torch.optim.Muon([weight])
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops(48, 20)


def test_report_shows_own_settings_and_lists_others(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    run = time_to_loss.planned(["stamps"], ["baseline"], [0], {})[0]
    for record_of, final in ((run, 2.5), (with_changes(run, {"batch": 9}), 2.0)):
        record = {"data": "stamps", "way": "baseline", "seed": 0, "settings": record_of.settings(), "tflop": 7.0}
        record |= {"curve": [[4, 3.5, 3.0], [8, 7.0, final]], "final": final, "train_losses": [3.0] * 20}
        record_of.path(tmp_path).write_text(json.dumps(record), encoding="utf-8")
    assert time_to_loss.main(["--results", str(tmp_path), "--report", "--figure", str(tmp_path / "curves.svg")]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["stamps"]["ways"]["baseline"]["losses"] == [2.5] and line["stamps"]["prediction_errors"] == [0.0]
    assert [other["final"] for other in line["others"]] == [2.0]
    assert "baseline (1)" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_captions_of_rich_scenes_say_where_colours_are():
    assert draw_rich_scene(random.Random(0))[1] == draw_rich_scene(random.Random(0))[1]
    sides = {place: RELATIONS[relation] for relation, places in PLACES.items() for place in places}
    seen, pictures = set(), set()
    for seed in range(40):
        picture, caption = draw_rich_scene(random.Random(seed))
        place = max((place for place in sides if f" {place} " in caption), key=len)
        colours = [next(word for word in part.split() if word in COLOURS) for part in caption.split(f" {place} ")]
        x, y = (centre_of(picture, colours[0]) - centre_of(picture, colours[1])).tolist()
        dx, dy = sides[place]
        assert picture.size == (112, 112)
        assert dx * x + dy * y > 20, caption
        seen.add((dx, dy))
        pictures.add(picture.tobytes())
    assert (len(seen), len(pictures)) == (4, 40)


def centre_of(picture, colour):
    """Return the mean (x, y) of the pixels that are closer to a colour than to all others and to the background."""
    pixels = torch.from_numpy(np.array(picture, np.float32)).flatten(0, 1)
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    rows = (torch.cdist(pixels, palette).argmin(1) == list(COLOURS).index(colour)).nonzero()[:, 0]
    return torch.stack([rows % picture.width, rows // picture.width]).float().mean(1)
