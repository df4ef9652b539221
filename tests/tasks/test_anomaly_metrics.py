"""Thresholds, point adjustment, affiliation and areas: known answers, and numbers of other implementations.

Stored numbers of VUS come from aeon 1.6.0, those of affiliation from dtaianomaly 0.5.1, on the series drawn here.
"""

import numpy as np
import pytest

from ssmzoo.tasks.metrics.anomaly import adjusted, affiliation, confusion, percentile_threshold, segments
from ssmzoo.tasks.metrics.anomaly_areas import point_areas, range_areas, soft_labels, volumes


def mask(length: int, *spans) -> np.ndarray:
    out = np.zeros(length, bool)
    for a, b in spans:
        out[a:b] = True
    return out


def drawn():
    rng = np.random.default_rng(11)
    label = mask(400, (0, 6), (90, 120), (200, 203), (390, 400))
    return rng.normal(size=400) + 1.2 * label, label


def test_segments_and_counts():
    label = mask(10, (0, 2), (5, 6), (8, 10))
    assert segments(label) == [(0, 2), (5, 6), (8, 10)] and segments(~mask(3, (0, 3))) == []
    counts = confusion(mask(10, (1, 4), (8, 9)), label)
    assert tuple(counts) == (2, 2, 3, 3) and counts.precision == 0.5 and counts.recall == 0.4
    assert counts.f1 == pytest.approx(4 / 9) and counts.accuracy == 0.5
    empty = confusion(np.zeros(4, bool), np.zeros(4, bool))
    assert (empty.precision, empty.recall, empty.f1, empty.accuracy) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="3 predictions and 4 labels"):
        confusion(np.zeros(3), np.zeros(4))


def test_the_threshold_is_a_percentile_of_all_given_scores():
    assert percentile_threshold((np.arange(50.0), np.arange(50.0, 101.0)), 10) == 90


def test_point_adjustment_fills_whole_segments_and_the_released_loop_leaves_index_0():
    label = mask(12, (0, 4), (6, 9), (10, 12))
    predicted = mask(12, (2, 3), (4, 5), (11, 12))
    whole, published = adjusted(predicted, label), adjusted(predicted, label, published=True)
    assert segments(whole) == [(0, 5), (10, 12)] and segments(published) == [(1, 5), (10, 12)]
    assert segments(adjusted(mask(12, (0, 1)), label, published=True)) == [(0, 4)]


def test_affiliation_of_simple_answers():
    label = mask(100, (40, 50))
    assert affiliation(label, label) == (1, 1)
    assert affiliation(np.zeros(100, bool), label) == (0, 0)
    everywhere = affiliation(np.ones(100, bool), label)
    assert everywhere.recall == 1 and 0.5 < everywhere.precision < 0.6  # no better than a random guess
    near, far = (affiliation(mask(100, (a, a + 5)), label) for a in (52, 90))
    assert near.precision > far.precision and near.recall > far.recall
    with pytest.raises(ValueError, match="at least one true segment"):
        affiliation(label, np.zeros(100, bool))


def test_affiliation_equals_another_implementation():
    score, label = drawn()
    got = affiliation(score > 2, label)
    assert (got.precision, got.recall, got.f1) == pytest.approx(AFFILIATION, abs=1e-12)


def test_areas_equal_another_implementation():
    score, label = drawn()
    for width, expected in RANGE.items():
        got = range_areas(score, label, width)
        assert (got.roc, got.pr) == pytest.approx(expected, abs=1e-9), width
    assert tuple(volumes(score, label, 30)) == pytest.approx(VOLUMES, abs=1e-9)


def test_soft_labels_fall_on_both_sides_and_stay_within_1():
    weight = soft_labels(mask(30, (10, 12)), 8)
    assert weight.max() == 1 and np.flatnonzero(weight).tolist() == list(range(6, 15))
    assert weight[9] == pytest.approx(np.sqrt(1 - 1 / 8)) and weight[14] == pytest.approx(np.sqrt(1 - 3 / 8))


def test_a_perfect_score_has_full_areas_and_a_constant_one_none_to_speak_of():
    label = mask(300, (50, 60), (200, 230))
    assert tuple(point_areas(label.astype(float), label)) == (1, 1)
    assert point_areas(np.zeros(300), label).roc == 0.5
    assert range_areas(label + 1e-3 * np.arange(300), label, 0).roc > 0.99


AFFILIATION = (0.6495912300260125, 0.8059609039058768, 0.7193766856111716)
RANGE = {
    0: (0.8230129658701089, 0.4397267751700296),
    1: (0.8230129658701089, 0.4397267751700296),
    7: (0.8343610159026316, 0.45659460454179274),
    40: (0.8382483670923856, 0.5539743295366615),
}
VOLUMES = (0.8263198390836562, 0.4687816240368815)
