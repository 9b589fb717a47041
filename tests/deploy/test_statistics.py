"""Means, bootstrap intervals and comparisons of evaluation results."""

from dataclasses import replace

import pytest

from llava_twophase.deploy.evaluate import RecordResult
from llava_twophase.deploy.statistics import by_length, chrf, compare, summarize
from llava_twophase.errors import UserError


def results(losses):
    return [
        RecordResult(
            image=f"{i}.jpg",
            caption="a red circle" if i % 2 else "a red circle left of a blue square",
            generated="a red circle",
            tokens=4 + 4 * (i % 2 == 0),
            loss=loss,
            loss_shuffled=loss + 1,
            loss_without=loss + 2,
            rank=i % 2,
        )
        for i, loss in enumerate(losses)
    ]


def test_summarize_has_the_mean_inside_its_interval():
    summary = summarize(results([1.0, 2.0, 3.0, 4.0]))
    assert summary["loss"].value == 2.5 and summary["loss"].low < 2.5 < summary["loss"].high
    assert summary["gain"].value == summary["gain"].low == summary["gain"].high == 1
    assert summary["recall_at_1"].value == summary["exact"].value == 0.5


def test_compare_pairs_the_records():
    one = results([1.0, 5.0, 9.0, 30.0])
    other = [replace(result, loss=result.loss + 0.5) for result in one]
    difference = compare(other, one)["loss"]
    assert difference.value == difference.low == difference.high == 0.5


def test_compare_refuses_other_records():
    with pytest.raises(UserError, match="different records"):
        compare(results([1.0, 2.0]), results([1.0]))


def test_by_length_splits_at_quantiles():
    rows = by_length(results([1.0, 2.0, 1.0, 2.0]), bins=2)
    assert [(row["tokens_from"], row["tokens_to"], row["records"]) for row in rows] == [(4, 4, 2), (8, 8, 2)]
    assert [row["loss"] for row in rows] == [2.0, 1.0]
    assert [row["length_ratio"] for row in rows] == [1.0, 3 / 8]


def test_chrf_is_100_for_equal_captions():
    assert chrf("a red circle", "a red circle\n") == 100
    assert 0 < chrf("a red square", "a red circle") < 100
