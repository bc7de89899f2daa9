"""Say what a number of examples can show, before they are labelled. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kd.deploy import quality
from kd.deploy.quality import LEVEL

DISCORDANT = (0.05, 0.1, 0.15, 0.2)  # shares of examples that one of the two alone gets right: the usual range


@dataclass(frozen=True)
class Plan:
    """What ``n`` examples show of a ``difference`` (student − teacher) if a share of ``discordant`` are discordant.

    ``interval``: of 95 %; ``lower``, ``upper``: one-sided limits of 95 %. ``needed``: examples for a power of 80 % to
    show that nothing is lost beyond the margin, if there is no difference, by the score test; ``textbook``: the same by
    (z₀.₉₅ + z₀.₈)² · discordant ÷ margin²; ``shown_margin``: the margin for which ``n`` examples have that power.
    """

    n: int
    difference: float
    margin: float
    discordant: float
    interval: tuple[float, float]
    lower: float
    upper: float
    needed: int
    textbook: float
    shown_margin: float

    @property
    def shows(self) -> str:
        """Tell what these examples show of the margin: ``not inferior``, ``inferior``, or ``nothing``."""
        return "not inferior" if self.lower > -self.margin else "inferior" if self.upper < -self.margin else "nothing"


def plan(n: int, difference: float, margin: float) -> list[Plan]:
    """Return what ``n`` examples show for each share of :data:`DISCORDANT` that the difference allows, or for its own.

    Counts are whole: discordant examples are rounded so that the difference is kept to one example.
    """
    net = round(n * difference)
    shares = [share for share in DISCORDANT if round(share * n) >= abs(net)] or [abs(difference)]
    found = []
    for share in shares:
        gained = max(0, round((share * n + net) / 2))
        lost = max(0, gained - net)
        needed = quality.examples_needed(share, margin)
        assert needed is not None  # for a margin above 0
        textbook, shown = quality.first_estimate(share, margin), quality.shown_margin(n, share)
        both, limits = quality.interval(gained, lost, n), quality.interval(gained, lost, n, 2 * LEVEL - 1)
        found.append(Plan(n, net / n, margin, share, both, *limits, needed, textbook, shown))
    return found


def sentence(plans: list[Plan]) -> str:
    """Say in one sentence whether the examples settle the margin, and how many would."""
    first, last = plans[0], plans[-1]
    n, margin, difference = first.n, 100 * first.margin, 100 * first.difference
    seen = "no difference" if not first.difference else f"a difference of {difference:+.1f} points"
    reach = [min(p.interval[0] for p in plans), max(p.interval[1] for p in plans)]
    shown = {p.shows for p in plans}
    verdict = {
        frozenset({"not inferior"}): "settle a margin of",
        frozenset({"inferior"}): "show a loss of more than",
        frozenset({"nothing"}): "do not settle a margin of",
    }.get(frozenset(shown), "may settle a margin of")
    needed = f"{first.needed:,}" if len(plans) == 1 else f"{first.needed:,} to {last.needed:,}"
    return (
        f"{n:,} examples with {seen} {verdict} {margin:g} points: the truth may lie between {100 * reach[0]:+.1f} "
        f"and {100 * reach[1]:+.1f} points; {needed} are needed to see, with a power of 80 %, that nothing is lost."
    )
