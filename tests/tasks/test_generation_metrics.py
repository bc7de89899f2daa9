"""Rouge-L and exact match against values that were computed by hand."""

from __future__ import annotations

import pytest

from kd.tasks.generation_metrics import METRICS, exact_match, generation_metrics, normalised, rouge_l, words


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1: S2 beside S1
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # S3
        ("the cat", "the cat sat on the mat", 2 * 1 * (2 / 6) / (1 + 2 / 6)),
        ("The Cat!", "the cat", 1.0),
        ("one two", "three four", 0.0),
        ("", "three four", 0.0),
        ("größer als zwölf", "größer als elf", 2 / 3),  # not cut at ö and ß
        ("a c b d", ["x y", "a b c d"], 3 / 4),  # the best reference
    ],
)
def test_rouge_l(prediction: str, reference: str | list[str], expected: float) -> None:
    assert rouge_l([prediction], [reference]) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_is_a_mean_over_predictions() -> None:
    assert rouge_l(["a b", "c"], ["a b", "d"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The  Answer, is 42.", "answer is 42", 1.0),
        ("An apple", ["pear", "apple"], 1.0),
        ("4 2", "42", 0.0),
        ("theory", "ory", 0.0),  # an article is a whole word
        ("„Ja“", "ja", 1.0),
    ],
)
def test_exact_match(prediction: str, references: str | list[str], expected: float) -> None:
    assert exact_match([prediction], [references]) == expected


def test_normalised_is_that_of_squad() -> None:
    assert normalised(" The quick (brown) fox's  A-Z = ") == "quick brown foxs az"


def test_words_of_ascii_are_letters_and_digits() -> None:
    assert words("It's snake_case, 2 times!") == ["it", "s", "snake", "case", "2", "times"]


def test_all_of_them_have_a_description() -> None:
    found = generation_metrics(["a b", "the x."], ["a b c", "x"])
    assert list(found) == [metric.name for metric in METRICS]
    assert found == pytest.approx({"rouge_l": (0.8 + 2 / 3) / 2, "exact_match": 0.5})


@pytest.mark.parametrize("function", [rouge_l, exact_match])
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"]), (["a"], [[]])])
def test_numbers_that_do_not_fit_are_refused(function, predictions, references) -> None:
    with pytest.raises(ValueError, match=r"^references = .* is not allowed: it must be"):
        function(predictions, references)
