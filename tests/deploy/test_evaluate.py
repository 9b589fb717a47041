"""Losses, ranks and captions of held-out records."""

import json
from dataclasses import replace

import pytest
import torch

from commands import use_command
from drawn import make_record, write_records
from helpers import run
from llava_twophase import Captioner, FeatureCache, load_records
from llava_twophase.deploy.captioner import Placement
from llava_twophase.deploy.evaluate import EvaluationSettings, caption_losses, evaluate, other_positions
from llava_twophase.deploy.evaluation_report import EvaluationOptions, evaluate_runs
from llava_twophase.deploy.statistics import METRICS
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.data.collator import collate


@pytest.fixture(scope="module")
def captioner(trained):
    return Captioner.load(trained.run, feature_cache=trained.cache)


def sample(captioner, caption):
    input_ids, labels = captioner.template(caption)
    return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}


def test_caption_losses_equal_the_loss_of_training(captioner, trained):
    records = load_records(trained.records)[:5]
    features = FeatureCache(trained.cache).read_tensor([record.image for record in records])
    losses, counts = caption_losses(captioner, [record.caption for record in records], features)
    for position, record in enumerate(records):
        batch = collate([sample(captioner, record.caption)])
        expected = captioner.model(**batch, features=features[position : position + 1])["loss"].item()
        assert losses[position] == pytest.approx(expected, abs=1e-5)
        assert counts[position] == (batch["labels"] != -100).sum()


def test_caption_losses_without_image_use_the_text_alone(captioner):
    (loss,), (count,) = caption_losses(captioner, ["a red circle"], None)
    ids = captioner.template("a red circle")[0]
    del ids[captioner.template.image_position]
    logits = captioner.model.llm(torch.tensor([ids])).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert loss == pytest.approx(expected.item(), abs=1e-5) and count == len(ids) - 1


def test_caption_losses_do_not_depend_on_the_batch(captioner, trained):
    records = load_records(trained.records)[:4]
    features = FeatureCache(trained.cache).read_tensor([record.image for record in records])
    together, _ = caption_losses(captioner, [record.caption for record in records], features)
    alone = [caption_losses(captioner, [r.caption], features[i : i + 1])[0][0] for i, r in enumerate(records)]
    assert together == pytest.approx(alone, abs=1e-5)


def test_other_positions_have_other_captions():
    captions = ["a", "b", "a", "c", "b"]
    others = other_positions(captions, 2, seed=0)
    for caption, positions in zip(captions, others, strict=True):
        texts = [captions[position] for position in positions]
        assert caption not in texts and len(set(texts)) == len(texts) == 2
    assert others == other_positions(captions, 2, seed=0)


def test_other_positions_refuses_equal_captions():
    with pytest.raises(UserError, match="at least two different"):
        other_positions(["a", "a"], 1, seed=0)


def test_evaluate_ranks_the_true_caption(captioner, trained):
    records = load_records(trained.records)
    features = FeatureCache(trained.cache).read_tensor
    results = evaluate(captioner, records, features, EvaluationSettings(batch_size=5, candidates=4))
    assert [result.image for result in results] == trained.keys
    for position, result in enumerate(results):
        others = other_positions([record.caption for record in records], 3, seed=0)[position]
        candidates = [records[other].caption for other in others]
        losses, _ = caption_losses(captioner, candidates, features([result.image] * len(candidates)))
        assert result.rank == sum(loss <= result.loss for loss in losses)


def options_of(trained, **changes):
    return EvaluationOptions(
        **{
            "data_path": str(trained.records),
            "image_folder": None,
            "feature_cache": [str(trained.cache)],
            "limit": 4,
            "html": None,
            "json": False,
            "settings": EvaluationSettings(batch_size=4, candidates=3),
            **changes,
        }
    )


def test_evaluate_command_compares_runs_and_writes_a_page(trained, tmp_path):
    page = tmp_path / "report.html"
    flags = {"data_path": trained.records, "image_folder": trained.images, "candidates": 3, "limit": 6, "html": page}
    bare = trained.run / "mm_projector.bin"
    done = run(["python", *use_command("evaluate", trained.run, bare, "--json", **flags, feature_cache=trained.cache)])
    report = json.loads(done.stdout)
    assert report["evaluated_records"] == 6 and list(report["runs"]) == [str(trained.run), str(bare)]
    difference = report["differences"][str(bare)]
    assert all(value["low"] == value["value"] == value["high"] == 0 for value in difference.values())
    text = page.read_text(encoding="utf-8")
    assert "They do not predict how good a model is" in text and "data:image/jpeg" in text


def test_evaluate_runs_prints_one_line_for_each_metric_at_80_columns(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    projector = find_projector(trained.run)
    evaluate_runs({"a" * 60: projector, "b" * 60: projector}, Placement(), options_of(trained))
    lines = capsys.readouterr().out.splitlines()[1:]  # the first has the path of the records
    assert max(map(len, lines)) <= 80
    for text, _ in METRICS.values():
        assert len([line for line in lines if text in line and "[" in line]) == 3  # two runs and their difference


def test_evaluate_runs_of_different_towers_asks_for_the_images(trained, tiny_siglip):
    runs = {"a": find_projector(trained.run), "b": find_projector(trained.run, vision_tower=str(tiny_siglip))}
    with pytest.raises(UserError, match="different towers or settings are compared ") as caught:
        evaluate_runs(runs, Placement(), options_of(trained))
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  b: {trained.cache} was made from {trained.tower}, whose weights differ from")


@pytest.mark.parametrize("with_folder", [True, False])
def test_evaluate_runs_reports_missing_images_before_a_model_loads(with_folder, trained, tmp_path):
    records = [make_record("1", trained.keys[0], "one"), make_record("2", "absent.jpg", "two")]
    data = str(write_records(records, tmp_path / "records.json"))
    folder = str(trained.images) if with_folder else None
    runs = {"a": replace(find_projector(trained.run), llm="/nowhere")}
    with pytest.raises(UserError, match=f"1 of 2 images not found in {trained.cache}") as caught:
        evaluate_runs(runs, Placement(), options_of(trained, data_path=data, image_folder=folder))
    advice = [] if with_folder else ["; give --image_folder too, or extract them"]
    assert all(words in str(caught.value) for words in ["\n  absent.jpg", *advice])


def test_evaluate_runs_needs_two_captions_before_a_model_loads(trained, tmp_path):
    data = str(write_records([make_record("1", trained.keys[0], "one")], tmp_path / "held_out.json"))
    runs = {"a": replace(find_projector(trained.run), llm="/nowhere")}
    with pytest.raises(UserError, match=r"held_out\.json: 1 record with 1 caption to evaluate; expected at least two"):
        evaluate_runs(runs, Placement(), options_of(trained, data_path=data))


def test_evaluate_command_needs_images(trained):
    done = run(["python", *use_command("evaluate", trained.run, data_path=trained.records)], expect=1)
    assert "give --image_folder or --feature_cache" in done.stderr
