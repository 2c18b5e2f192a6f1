"""Confidence sequences by betting, and verdicts on them: true at any time, whatever the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paradiffpolicy.study.betting import WEIGHTS, BoundedMean, log_capitals, log_mixture
from paradiffpolicy.study.verdicts import CLAIMS, TESTS, fixed_size, holm_levels, judge

MARGIN, ERROR, BLOCK = 0.05, 0.05, 20


def rare(draw, mean, sign, shape):
    """One value in ten at a bound, the others equal: the mean lies on the far side of most values."""
    rest = (mean - 0.1 * sign) / 0.9
    return np.where(draw.random(shape) < 0.1, float(sign), rest)


def success(draw, mean, sign, shape):
    """Nine pairs in ten agree."""
    u = draw.random(shape)
    return (u < 0.05 + mean / 2) - (u >= 0.95 + mean / 2).astype(float)


def narrow(draw, mean, sign, shape):
    return mean + 0.1 * (draw.random(shape) - 0.5)


def p_values(values, margin, claim):
    """The smallest of all looks, by the functions that ``BoundedMean`` uses: ``[experiments, n]`` values."""
    found = []
    for bound, side in TESTS[claim]:
        origin = -1.0 if side == "above" else 1.0
        ratios = (values - origin) / (bound * margin - origin)
        wealth = log_mixture(log_capitals(ratios, range(0, values.shape[1], BLOCK)))
        found.append(np.exp(-wealth.max(axis=-1).clip(0)))
    return np.max(found, axis=0)


def sequence(*looks):
    mean = BoundedMean(-1, 1)
    for values in looks:
        mean.add(values)
    return mean


# ------------------------------------------------------------------------------------------- error rates

NULL = {"equivalent": MARGIN, "better": 0.0, "non_inferior": -MARGIN, "worse": -MARGIN}
"""The mean where a claim is only just false."""


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("non_inferior", success),
        ("non_inferior", narrow),
        ("non_inferior", rare),
        ("worse", success),
        ("better", rare),
        ("equivalent", rare),
        ("equivalent", success),
    ],
)
def test_false_claims_are_rare_however_often_one_looks(claim, values):
    """10,000 experiments at the margin, looked at after every 20 of 1,000 seeds."""
    draw, n, false = np.random.default_rng(0), 10_000, 0
    sign = 1 if TESTS[claim][-1][1] == "below" else -1  # rare values hide what refutes the claim
    for _ in range(n // 250):
        x = values(draw, NULL[claim], sign, (250, 1000))
        false += int((p_values(x, MARGIN, claim) <= ERROR).sum())
    assert false <= ERROR * n
    assert false > 0.005 * n or values is narrow  # it isn't a test that never claims anything


def test_false_claims_of_many_questions_are_rare():
    """Of four questions on the same seeds two are at the margin, two better: 5 % for any false claim."""
    draw, claimed, shape = np.random.default_rng(1), [], (500, 400)
    for _ in range(20):  # 10,000 studies
        questions = [rare(draw, -MARGIN, -1, shape), success(draw, -MARGIN, -1, shape)]
        questions += [narrow(draw, 0.2, 1, shape), narrow(draw, 0.1, 1, shape) + 0.2 * questions[0]]
        p = np.stack([p_values(x, MARGIN, "non_inferior") for x in questions], axis=1)
        claimed += [np.array(row) <= holm_levels(list(row), ERROR) for row in p]
    assert np.mean(claimed, axis=0)[2:].mean() > 0.9
    assert 0.005 < np.any(np.array(claimed)[:, :2], axis=1).mean() <= ERROR


def test_simulations_and_sequences_are_of_the_same_code():
    x = success(np.random.default_rng(2), 0.02, 1, (3, 200))
    for row in x:
        (answer,) = judge([sequence(*row.reshape(-1, BLOCK))], [MARGIN])
        for claim in CLAIMS:
            assert answer.p_values[claim] == pytest.approx(p_values(row[None], MARGIN, claim)[0], rel=1e-9)


# -------------------------------------------------------------------------------------------- properties

VALUES = st.lists(st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-1, 1)), min_size=1, max_size=60)
quick = settings(max_examples=25, deadline=None)


@quick
@given(VALUES, st.randoms(use_true_random=False), st.floats(-0.9, 0.9))
def test_the_order_of_values_does_not_matter(values, random, bound):
    shuffled = random.sample(values, len(values))
    for side in ("above", "below"):
        a, b = sequence(values), sequence(shuffled)
        assert a.log_e(bound, side) == pytest.approx(b.log_e(bound, side), abs=1e-9)


@quick
@given(VALUES, st.floats(1e-6, 0.5))
def test_an_interval_of_one_look_contains_the_mean_and_shrinks_with_the_error(values, error):
    found = sequence(values)
    low, high = found.interval(error)
    assert -1 <= low <= found.mean <= high <= 1
    wider = found.interval(error / 2)
    assert wider[0] <= low and high <= wider[1]


@quick
@given(st.lists(VALUES, min_size=1, max_size=3), st.floats(0.001, 0.9), st.floats(-0.99, 0.99))
def test_an_interval_is_what_no_look_refutes(looks, error, bound):
    found = sequence(*looks)
    level = math.log(error / 2)
    refuted = [found.log_p(bound, side) <= level for side in ("above", "below")]
    low, high = found.interval(error)
    assume(min(abs(bound - low), abs(bound - high)) > 1e-9)
    assume(not all(refuted))  # looks that contradict each other
    assert (low < bound < high) == (not any(refuted))


@quick
@given(st.lists(VALUES, min_size=1, max_size=3), st.floats(-0.9, 0.9), st.floats(0, 0.09))
def test_evidence_falls_as_the_hypothesis_rises_and_is_never_lost(looks, bound, step):
    found = sequence(*looks)
    assert found.log_e(bound + step, "above") <= found.log_e(bound, "above") + 1e-9
    before = found.log_p(bound, "above")
    found.add([-1.0] * 5)
    assert found.log_p(bound, "above") == pytest.approx(before, abs=1e-9)
    mirrored = sequence(*([-x for x in values] for values in looks), [1.0] * 5)
    assert mirrored.log_e(-bound, "below") == pytest.approx(found.log_e(bound, "above"), abs=1e-9)


@pytest.mark.parametrize("value", [1.5, -1.0001, math.nan, math.inf])
def test_values_out_of_bounds_are_named_and_nothing_is_added(value):
    found = sequence([0.5])
    with pytest.raises(ValueError, match=rf"value {value:g} is out of its bounds, \[-1, 1\]"):
        found.add([0.0, value])
    assert found.n == 1


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="low=1, high=0"):
        BoundedMean(1, 0)
    with pytest.raises(ValueError, match="mean of -1 is not between"):
        sequence([0.0]).log_e(-1, "above")
    with pytest.raises(ValueError, match=r"in \(0, 1\): 0"):
        sequence([0.0]).interval(0)
    for margins, error, message in (
        ([], 0.05, "1 questions, but 0 margins"),
        ([0.0], 0.05, "margin must be positive: 0"),
        ([0.1], 0.5, "error must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            judge([sequence([0.0])], margins, error)


def test_values_that_are_all_equal_need_what_rare_ones_at_the_bound_allow():
    """A value of -1 in 33 would move the mean below the margin of 0.03: some hundred seeds, at the least."""
    assert sequence([0.0] * 98).log_p(-0.03, "above") > math.log(ERROR)
    assert sequence([0.0] * 150).log_p(-0.03, "above") < math.log(ERROR)
    assert WEIGHTS.sum() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- verdicts


def around(mean, n, half=0.05):
    """Values of exactly this mean."""
    return [mean + half * (-1) ** k for k in range(n)]


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [(0.0, "equivalent within 0.05"), (0.3, "better"), (-0.2, "worse by more than 0.05")],
)
def test_verdicts(mean, verdict):
    (answer,) = judge([sequence(around(mean, 400))], [MARGIN])
    assert answer.verdict == verdict and answer.decided and answer.seeds_needed is None
    low, high = answer.interval
    assert low < mean < high and answer.confidence == pytest.approx(0.9)


def test_a_difference_that_may_be_better_is_non_inferior():
    (answer,) = judge([sequence([*around(0.0, 150, 0.5), *around(0.05, 150, 0.5)])], [0.1])
    assert (answer.claim, answer.verdict) == ("non_inferior", "non-inferior within 0.1")
    assert answer.interval[0] > -0.1


def test_an_open_question_says_how_many_seeds_would_decide():
    """And so many do, if differences stay as they are."""
    (answer,) = judge([sequence(around(0.0, 40, 0.2))], [MARGIN])
    more = answer.seeds_needed
    assert answer.verdict == f"inconclusive: about {more} more seeds would decide"
    assert judge([sequence(around(0.0, 40 + more + more % 2, 0.2))], [MARGIN])[0].decided
    assert not judge([sequence(around(0.0, 36 + more - more % 2, 0.2))], [MARGIN])[0].decided


def test_nothing_is_known_of_no_seeds_or_a_mean_at_the_margin():
    for found in (sequence(), sequence([-0.25, 0.15])):
        (answer,) = judge([found], [MARGIN])
        assert answer.verdict == "inconclusive" and answer.fixed_n is None
        assert not answer.decided
    assert judge([], [], ERROR) == []


def test_questions_are_tested_together():
    """An interval's confidence follows Holm's level; it lies within the margin just where that is claimed."""
    sizes = (60, 85, 95, 110, 300)
    together = judge([sequence(around(0.0, n)) for n in sizes], [MARGIN] * len(sizes))
    alone = [judge([sequence(around(0.0, n))], [MARGIN])[0] for n in sizes]
    assert sum(a.decided for a in together) < sum(a.decided for a in alone)
    for answer in together:
        assert answer.confidence == pytest.approx(1 - 2 * answer.levels["equivalent"])
        inside = max(map(abs, answer.interval)) < MARGIN
        assert inside == (answer.claim == "equivalent")
    assert holm_levels([0.3, 0.001, 0.02], 0.06) == pytest.approx([0.06, 0.02, 0.03])


def test_a_fixed_number_of_seeds_decides_with_a_chance_of_four_fifths():
    n = fixed_size(0.05, 0.15, ERROR)
    draw = np.random.default_rng(3).normal(0.05, 0.15, (2000, n))
    t = draw.mean(axis=1) / (draw.std(axis=1, ddof=1) / math.sqrt(n))
    assert (t > 1.672).mean() == pytest.approx(0.8, abs=0.03)
    assert fixed_size(0.0, 0.1, ERROR) is None and fixed_size(1e-6, 1.0, ERROR) is None
