"""What a summary says of records that were made by hand."""

import csv
import io

import pytest

from keras_compaware.search import (
    Trial,
    aggregate,
    best_periods,
    csv_text,
    distortions,
    in_order,
    markdown,
)
from tests.search.helpers import record


def best(*records):
    (row,) = best_periods(aggregate(records))
    return row


def test_means_and_deviations_over_seeds():
    (row,) = aggregate([record(validation=0.7, test=0.5), record(validation=0.8, test=0.7, seed=1)])
    assert row["seeds"] == 2
    assert row["validation"] == pytest.approx(0.75)
    assert row["test"] == pytest.approx(0.6)
    assert row["test_std"] == pytest.approx(0.02**0.5)
    (alone,) = aggregate([record(test=0.5)])
    assert (alone["test"], alone["test_std"]) == (0.5, None)


def test_what_diverged_or_failed_is_counted_and_not_averaged():
    rows = aggregate(
        [
            record(test=0.5),
            record(status="diverged", seed=1),
            record(status="failed", seed=2),
            record(10, status="diverged"),
        ]
    )
    assert [(r["seeds"], r["diverged"], r["failed"]) for r in rows] == [(1, 1, 1), (0, 1, 0)]
    assert [r["test"] for r in rows] == [0.5, None]


def test_best_is_chosen_on_the_validation_split_and_reported_on_the_test_split():
    row = best(
        record(1, validation=0.80, test=0.90),
        record(10, validation=0.82, test=0.70),
        record(100, validation=0.81, test=0.95),
    )
    assert (row["best_every"], row["test"]) == (10, 0.70)
    assert row["gain"] == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("validations", "place", "every"),
    [
        ([0.9, 0.8, 0.7], "best", 1),
        ([0.7, 0.8, 0.9], "worst", 100),
        ([0.8, 0.9, 0.7], "between", 10),
        ([0.8, 0.8, 0.8], "", 1),
        ([0.8, 0.8, 0.7], "best", 1),
        ([0.7, 0.8, 0.8], "worst", 10),
        ([None, 0.8, 0.7], "worst", 10),
        ([0.8, None, 0.7], "best", 1),
    ],
)
def test_where_period_1_stands(validations, place, every):
    records = [
        record(n, status="diverged") if v is None else record(n, validation=v)
        for n, v in zip((1, 10, 100), validations, strict=True)
    ]
    for order in (records, records[::-1]):
        row = best(*order)
        assert (row["place"], row["best_every"]) == (place, every)


def test_one_seed_that_diverged_puts_a_period_last():
    row = best(
        record(1, validation=0.5),
        record(10, validation=0.9),
        record(10, status="diverged", seed=1),
    )
    assert (row["best_every"], row["place"]) == (1, "best")


def test_without_period_1_or_without_results():
    row = best(record(10), record(100))
    assert (row["place"], row["test_at_1"], row["gain"]) == ("", None, None)
    assert best_periods(aggregate([record(1, status="failed")])) == []
    assert best_periods([]) == []


def test_baselines_stand_beside_the_best():
    row = best(
        record(1),
        record(kind="dense", test=0.95),
        record(kind="post_training", test=0.4),
        record(kind="post_training", test=0.6, seed=1),
        record(kind="straight_through", test=0.1, budget="1/8"),
    )
    assert (row["dense"], row["post_training"]) == (0.95, 0.5)
    assert row["post_training_std"] == pytest.approx(0.02**0.5)
    assert row["straight_through"] is None


def test_records_stand_in_the_order_of_trials_and_only_the_last_of_each():
    trials = [Trial("every", "low_rank", "1/4", n, "cosine", 0) for n in (100, 1, 10)]
    records = [record(1, status="failed"), record(7), record(100), record(1)]
    assert in_order(trials, records) == [record(100), record(1)]


def test_distortions_are_those_of_the_first_seed():
    points = [[10, 0.5], [20, 0.25]]
    rows = distortions(
        [
            record(10, distortions=points),
            record(10, distortions=[[10, 9.0]], seed=1),
            record(1, distortions=[]),
            record(kind="straight_through", distortions=points),
        ]
    )
    assert [(row["every"], row["firings"]) for row in rows] == [(10, points)]


def test_csv_can_be_read_again():
    rows = aggregate([record(1, test=0.5), record(10, status="diverged")])
    found = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [row["every"] for row in found] == ["1", "10"]
    assert [row["test"] for row in found] == ["0.5", ""]
    assert csv_text([record(1, kernels={"a": 1})]).splitlines()[0].endswith("kernel_ratio")


def test_markdown_says_it_all():
    rows = aggregate(
        [
            record(kind="dense", test=0.9),
            record(1, validation=0.7, test=0.71),
            record(1, validation=0.7, test=0.73, seed=1),
            record(10, validation=0.8, test=0.81),
            record(10, validation=0.8, test=0.85, seed=1),
            record(100, status="diverged"),
            record(kind="straight_through", test=0.88),
        ]
    )
    text = markdown(rows, {"low_rank": "low rank"})
    assert "dense, cosine: 90.00 %, 1 seed\n" in text
    assert (
        "| low rank | 1/4 | cosine | 25.0 % | 10 | 83.00 ± 2.83 | 72.00 ± 1.41 | +11.00 | between "
        "| 90.00 | 88.00 |" in text
    )
    assert "Of 1 curves, period 1 is the best in 0, between in 1, the worst in 0." in text
    assert "| low rank | 1/4 | cosine | 72.00 ± 1.41 | 83.00 ± 2.83 | 1 diverged |" in text
    assert markdown(rows, {"low_rank": "low rank"}) == text
    assert "distortion" not in text
    known = aggregate([record(1, distortion=0.0), record(10, distortion=0.123456)])
    assert "\n| low_rank | 1/4 | cosine | 0.000 | 0.123 |\n" in markdown(known)


def test_markdown_without_a_result():
    assert markdown([]).startswith("Test accuracy in %")
