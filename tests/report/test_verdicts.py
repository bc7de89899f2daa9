"""Each word of a verdict, with numbers; what its sentence says; how a study counts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.weightstats import ttost_paired

from kd.report import claims, frame, stats, teacher_weights, verdicts
from kd.report.claims import Compared
from kd.report.measures import Measure
from kd.report.verdicts import UNDECIDED, Judged, Verdict
from kd.studies.study import Comparison, Condition, Row


@pytest.fixture
def found(study, runs):
    return frame.of_study(study, runs)


def compared(differences: list[float], sesoi: float | None = None, share_of: str | None = None) -> Compared:
    comparison = Comparison("c", "a", "b", "test/acc1", share_of=share_of, sesoi=sesoi)
    interval = stats.difference(differences, [0.0] * len(differences))
    return Compared(comparison, "“A” − “B”", Measure("last/test/acc1"), interval)


UP, AROUND, DOWN = [0.02, 0.01, 0.03, 0.02], [0.001, -0.001, 0.002, -0.001], [-0.02, -0.01, -0.03, -0.02]
WIDE = [0.05, -0.04, 0.02, 0.01]


@pytest.mark.parametrize(
    ("differences", "condition", "sesoi", "ours", "paper"),
    [
        (UP, {"above": 0.0}, 0.01, "supported", "supported"),
        (UP, {"above": 0.015}, 0.01, "undecided", "undecided"),
        (UP, {"below": 0.0}, 0.01, "rejected", "contradicted"),
        (DOWN, {"above": 0.0}, 0.01, "rejected", "contradicted"),
        (DOWN, {"below": 0.0}, None, "supported", "supported"),
        (DOWN, {"inside": (-0.005, 0.005)}, None, "rejected", "contradicted"),
        (AROUND, {"inside": (-0.005, 0.005)}, None, "supported", "supported"),
        (AROUND, {"above": 0.0}, 0.01, "equivalent", "equivalent"),
        (AROUND, {"above": 0.0}, None, "undecided", "undecided"),
        (WIDE, {"above": 0.0}, 0.01, "undecided", "undecided"),
        (WIDE, {"above": 0.0}, 0.5, "equivalent", "equivalent"),
        ([0.02], {"above": 0.0}, 0.01, "undecided", "undecided"),
        ([0.001] * 4, {"above": 0.0}, 0.01, "undecided", "undecided"),  # no spread to judge by
    ],
)
def test_a_condition(differences, condition, sesoi, ours, paper) -> None:
    given = compared(differences, sesoi)
    words = [verdicts.judge(Condition("c", **condition), given, claim_of)[0] for claim_of in ("ours", "paper")]
    assert words == [ours, paper]


@pytest.mark.parametrize("bounds", [(0.0, 0.03), (-0.03, 0.0)])
def test_an_interval_that_touches_the_bound_fulfils_it_in_part(bounds) -> None:
    interval = replace(compared(UP).interval, theory=bounds)
    assert (
        verdicts.judge(Condition("c", above=0.0), replace(compared(UP), interval=interval), "paper")[0] == "undecided"
    )


@pytest.mark.parametrize("sesoi", [0.001, 0.002, 0.0025, 0.003, 0.006])
def test_equivalent_is_two_one_sided_tests(sesoi) -> None:
    """As statsmodels has it: p of the larger of the two one-sided tests below 5 %."""
    differences = np.random.default_rng(3).normal(0.0005, 0.002, 7)
    p = ttost_paired(differences, np.zeros(7), -sesoi, sesoi)[0]
    word, _ = verdicts.judge(Condition("c", above=0.0), compared(differences.tolist(), sesoi), "paper")
    assert word == ("equivalent" if p < 0.05 else "undecided")


def plain(sentence: str) -> str:
    return sentence.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("given", "claim_of", "sentence"),
    [
        (compared(UP, 0.01), "ours", "+2.00 points, 95 % interval +0.70 to +3.30 (Student's t, 4 seeds). It had to be "
         "above 0.00, and all of the interval is."),
        (compared([0.004, 0.003, 0.005, 0.004], 0.01), "ours", "It had to be above 0.00, and all of the interval is. "
         "The 90 % interval lies within ±1.00 points, the smallest effect of interest."),
        (compared(DOWN), "paper", "It had to be above 0.00, as the paper claims, and none of the interval is."),
        (compared(DOWN), "ours", "It had to be above 0.00, a bound of our own, and none of the interval is."),
        (compared(AROUND, 0.01), "ours", "It had to be above 0.00, and only a part of the interval is; the 90 % "
         "interval, −0.15 to +0.20, lies within ±1.00 points, the smallest effect of interest."),
        (compared(WIDE, 0.01), "ours", "had to be above 0.00, and only a part of the interval is; the 90 % interval, "
         "−3.40 to +5.40, reaches beyond ±1.00 points, the smallest effect of interest. The smallest effect that 4 "
         "seeds of this spread could have shown is 7.96 points (power 80 %)."),
        (compared(WIDE), "ours", "and only a part of the interval is. The smallest effect that 4 seeds of this spread "
         "could have shown is 7.96 points (power 80 %)."),
        (compared([0.02]), "ours", "one seed: no interval). It had to be above 0.00: without an interval nothing is "
         "decided."),
    ],
)  # fmt: skip
def test_the_sentence_says_why(given, claim_of, sentence) -> None:
    said = plain(verdicts.judge(Condition("c", above=0.0), given, claim_of)[1])
    assert said.startswith("c: “A” − “B”: ")
    assert said.endswith(sentence)


def test_what_could_have_been_shown_is_counted_from_the_bound() -> None:
    _, said = verdicts.judge(Condition("c", above=0.5), compared([0.4, 0.6, 0.7, 0.5], share_of="t", sesoi=0.1), "ours")
    assert "only a part of the interval is. The smallest difference from 50 % that 4 seeds" in plain(said)
    assert "could have shown is 27 % (power" in plain(said)


# ---------------------------------------------------------------------- of a study


def judged(*words: str, given: int = 0) -> tuple[Judged, ...]:
    return tuple(Judged(word, "why", i < given) for i, word in enumerate(words))


@pytest.mark.parametrize(
    ("verdict", "headline", "overall"),
    [
        (Verdict(judged("supported", "supported")), "2 supported", "supported"),
        (
            Verdict(judged("undecided", "supported", "equivalent")),
            "1 supported, 1 equivalent, 1 undecided",
            "undecided",
        ),
        (Verdict(judged("contradicted", "rejected"), True), "1 rejected, 1 contradicted; exploratory", UNDECIDED),
        (Verdict(judged("supported", "supported", given=2)), "2 supported; given this teacher", "supported"),
        (Verdict(judged("supported", "supported", given=1)), "2 supported (1 given this teacher)", "supported"),
        (Verdict(judged("supported", "incomplete")), "incomplete", UNDECIDED),
        (Verdict(), "", UNDECIDED),
    ],
)
def test_the_headline_counts_the_words(verdict, headline, overall) -> None:
    assert (verdict.headline, verdict.overall) == (headline, overall)


def test_a_condition_says_itself_who_claims_it(study, found) -> None:
    given = {"x": compared(DOWN), "y": compared(DOWN)}
    conditions = (Condition("x", above=0.0), Condition("y", above=0.0, claim_of="paper"))
    rows = {"a": Row("a", seeds=(0,)), "b": Row("b", seeds=(0,))}
    other = replace(study, supported=conditions, rows=rows)
    assert [c.word for c in verdicts.verdict(other, given, found).conditions] == ["rejected", "contradicted"]
    other = replace(other, claim_of="paper", supported=(conditions[0], replace(conditions[1], claim_of="ours")))
    assert [c.word for c in verdicts.verdict(other, given, found).conditions] == ["contradicted", "rejected"]


@pytest.mark.parametrize("status", ["missing", "failed", "interrupted", "running"])
def test_no_verdict_from_a_part_of_the_seeds(study, found, status) -> None:
    """Not even where the seeds that are there would do: who stops when it pleases proves anything."""
    given = claims.compare(study, found, None)
    assert verdicts.verdict(study, given, found).headline == "2 supported"
    begun = found.copy()
    begun.loc[(found["row"] == "distilled") & (found["seed"] == 2), "status"] = status
    assert verdicts.verdict(study, given, begun).headline == "incomplete"
    elsewhere = found.copy()
    elsewhere.loc[found["row"] == "shuffled", "status"] = status
    assert verdicts.verdict(study, given, elsewhere).headline == "2 supported", "a row that no condition compares"


def test_one_seed_decides_nothing(study, found) -> None:
    one = found[(found["row"] != "alone") | (found["seed"] == 2)]
    given = claims.compare(study, one, None)
    assert {c.word for c in verdicts.verdict(study, given, one).conditions} == {"undecided"}


OF_TEACHER = ("loss=[ce,kd]", "teacher.checkpoint={teacher}")


@pytest.mark.parametrize(
    ("distilled", "alone", "seeds", "one"),
    [
        (OF_TEACHER, (), (0,), True),
        (OF_TEACHER, OF_TEACHER, (0,), True),
        (OF_TEACHER, (), (0, 1, 2), False),  # a teacher for each seed
        (("teacher.checkpoint={teacher@1}",), (), (0, 1, 2), True),
        (("teacher.checkpoint={teacher@1}",), ("teacher.checkpoint={teacher@2}",), (0, 1, 2), False),
        (("teacher.checkpoint=[{teacher@1},{teacher@2}]",), (), (0, 1, 2), True),  # one ensemble
        (("teacher.checkpoint=weights.pt",), (), (0,), True),
        (("teacher.checkpoint=weights_{seed}.pt",), (), (0,), False),
        (("teacher.checkpoint=null",), (), (0,), False),
        ((), (), (0,), False),
        (("student.model.name={before}/last",), (), (0,), True),  # goes on from one that was distilled
        (("student.model.name={before}/last",), (), (0, 1, 2), False),
    ],
)
def test_given_this_teacher(study, distilled, alone, seeds, one) -> None:
    rows = {
        "teacher": Row("teacher", seeds=seeds),
        "before": Row("before", OF_TEACHER, seeds=(0, 1, 2)),
        "distilled": Row("distilled", distilled, seeds=(0, 1, 2)),
        "alone": Row("alone", alone, seeds=(0, 1, 2)),
    }
    other = replace(study, rows=rows)
    assert teacher_weights.is_one_run(other, study.comparisons["helps"]) is one
