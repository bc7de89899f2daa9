"""``kd cost``: the example that must come out exactly, break-even, sensitivity, and each bad input in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date

import pytest

from kd.deploy.cost import HOURS, Cost, Prices, Volume, compare, money, month
from kd.deploy.cost_file import CODES, SIGNS, names, read
from kd.errors import KdError

BY_HOUR = Prices(price_per_hour=2.0, requests_per_second=1.0)


def test_the_example_of_8000_conversations_comes_out_exactly() -> None:
    found = compare(read("customer_service"))
    assert (found.teacher_month, found.student_month) == (320.0, 35.0)
    assert found.saving_year == 3420.0
    assert found.currency == "€"


def test_a_machine_is_paid_for_the_hours_that_the_volume_takes_or_always() -> None:
    volume = Volume(requests=3600 * 100)
    assert month(BY_HOUR, volume) == 200.0
    assert month(BY_HOUR, volume, share=0.25) == 50.0
    assert month(replace(BY_HOUR, machines=2), volume) == 2 * HOURS * 2.0
    assert month(replace(BY_HOUR, machines=1), Volume(requests=3600 * HOURS * 2.5)) == 3 * HOURS * 2.0
    assert month(replace(BY_HOUR, machines=1), Volume(requests=3600 * HOURS)) == HOURS * 2.0
    assert month(replace(BY_HOUR, fixed=7), volume) == 207.0


def test_the_training_is_paid_back_after_its_cost_over_the_saving() -> None:
    cost = Cost(
        "EUR", Volume(1e6, 1, 1), Prices(1, 1), Prices(100, 102), {"machine": 300, "labels": 300}, date(2026, 1, 1)
    )
    found = compare(cost)
    assert found.saving_month == 200.0
    assert found.break_even_months == 3.0
    assert found.break_even == "2026-04-03"  # 3 × 30.4375 days, 91.3125, later
    half, double = (s for s in found.sensitivity if s.key == "training")
    assert (half.break_even_months, double.break_even_months) == (1.5, 6.0)
    never = compare(replace(cost, student=cost.teacher))
    assert never.break_even_months is None
    assert never.break_even is None


def test_sensitivity_recomputes_with_one_input_changed() -> None:
    cost = read("customer_service")
    found = {(s.key, s.factor): s.saving_year for s in compare(cost).sensitivity}
    for key, factor in found:
        part, name = key.split(".")
        value = getattr(getattr(cost, part), name)
        other = replace(cost, **{part: replace(getattr(cost, part), **{name: value * factor})})
        assert found[key, factor] == pytest.approx(compare(other).saving_year)
    assert found["teacher.price_out", 0.5] == 3420 - 12 * 80
    assert {key for key, _ in found} >= {"volume.requests", "student.price_in", "teacher.price_in"}


def test_a_cascade_pays_the_student_always_and_the_teacher_for_its_share() -> None:
    cost = read("customer_service")
    assert compare(cost, to_teacher=0.25).student_month == 35 + 80
    assert compare(cost, to_teacher=1.0).saving_month < 0


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(3420.0, "3,420 €"), (-3420.4, "-3,420 €"), (35.0, "35.00 €"), (0.004375, "0.004375 €"), (0.0, "0.00 €")],
)
def test_amounts_keep_the_digits_that_count(amount: float, shown: str) -> None:
    assert money(amount, "€") == shown


def test_currencies_are_codes_or_signs() -> None:
    assert all(len(code) == 3 and code.isupper() for code in CODES)
    assert {"EUR", "USD", "CHF", "JPY"} <= CODES
    assert "€" in SIGNS


@pytest.mark.parametrize("name", names())
def test_every_file_of_the_group_reads_and_saves(name: str) -> None:
    assert compare(read(name)).saving_month > 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("currency=BTC", "currency = BTC"),
        ("currency=eur", "(near: EUR"),
        ("currency=null", "currency is missing"),
        ("teacher.price_in=0", "teacher.price_in = 0 is not allowed: it must be a finite number above 0"),
        ("student.price_out=-1", "student.price_out = -1"),
        ("student.price_in=null", "student has price_out: it must have price_in and price_out"),
        ("student.price_per_hour=2", "student has price_in, price_out, price_per_hour"),
        ("student.machines=2", "student.machines is for prices per hour"),
        ("volume.tokens_in=null", "volume.tokens_in is missing"),
        ("volume.requests=0", "volume.requests = 0"),
        ("volume.request=3", "there is no key volume.request (near: requests"),
        ("volme.requests=3", "(near: volume)"),
        ("curency=EUR", "there is no key curency (near: currency)"),
        ("volume=3", "volume = 3"),
        ("training=3", "training = 3"),
        ("training.machine=-1", "training.machine = -1"),
        ("start=tomorrow", "start = tomorrow is not allowed: it must be a day"),
        ("volume.requests=[", "the value is not valid YAML"),
        ("volume.requests=.inf", "volume.requests = inf"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(kd, tmp_path, override: str, expected: str) -> None:
    said = kd("cost", "customer_service", override, "out=cost.json")
    assert said.code == 1
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_costs_are_refused(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    for text, expected in (("- 1", "not a mapping"), ("a: [", "cannot be read"), ("currency: EUR", "volume = null")):
        file.write_text(text)
        with pytest.raises(KdError, match=expected):
            read(str(file))
    with pytest.raises(KdError, match="near: customer_service"):
        read("customer_servise")


def test_the_command_prints_the_sentence_and_writes_the_numbers(kd, tmp_path) -> None:
    said = kd("cost", "customer_service", "training.machine=570", "start=2026-01-01", "out=cost.json")
    assert said.code == 0
    assert said.out.splitlines()[0] == (
        "The student saves 3,420 € a year; the training, 570 €, has paid for itself after 2.0 months, on 2026-03-03."
    )
    assert json.loads((tmp_path / "cost.json").read_text())["saving_year"] == 3420.0
    said = kd("cost", "customer_service", "student.price_in=20", "student.price_out=40")
    assert said.out.startswith("The student saves nothing: it costs 1,920 € more a year")


@pytest.mark.parametrize("arguments", [(), ("customer_service", "machine_hour"), ("customer_service", "out=a.txt")])
def test_what_is_typed_wrong_is_refused(kd, arguments: tuple[str, ...]) -> None:
    assert kd("cost", *arguments).code == 1
