"""GOLD: Patiño et al., Unlocking On-Policy Distillation for Any Model Family, Hugging Face report 2025, no paper."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_choice
from kd.losses.logits._divergences import check_share, js
from kd.losses.tokens._spans import check_lengths, lengths_of, mean_over_samples, sorted_l1

__all__ = ["gold_hybrid_loss", "gold_loss", "merge_groups", "same_bytes"]

MERGES = ("last", "first")
FLOOR = 1e-8  # of a probability, as in TRL


def same_bytes(student_ends: Tensor, teacher_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of tokens of one sample: a group ends where a token of both sides ends at one byte.

    ``student_ends`` (rows,), ``teacher_ends`` (rows,) int64, not falling: how many bytes of the answer are read after
    each token. What is left behind the last common end is one group. → the group of each row, on both sides.
    """
    common = student_ends[torch.isin(student_ends, teacher_ends)].unique()
    return torch.searchsorted(common, student_ends), torch.searchsorted(common, teacher_ends)


def merge_groups(log_probs: Tensor, ids: Tensor, groups: Tensor, merge: str = "last") -> Tensor:
    """Compute log-probabilities (groups, vocabulary) of groups of tokens, from those (rows, vocabulary) of the tokens.

    ``ids`` (rows,) int64: the token of each row; ``groups`` (rows,), not falling. ``merge``: ``"last"``, the
    distribution of the group's last row times the probabilities of its earlier tokens; ``"first"``, that of its first
    row times those of its later ones. They sum to less than 1 where a group has several tokens; such a factor is 1e-8
    or more.
    """
    check_choice("merge", merge, MERGES)
    scalars = log_probs.gather(-1, ids[:, None]).squeeze(-1).clamp(min=math.log(FLOOR))
    change = groups[1:] != groups[:-1]
    edge = F.pad(change, (0, 1), value=True) if merge == "last" else F.pad(change, (1, 0), value=True)
    _, rank = groups.unique_consecutive(return_inverse=True)
    base = edge.nonzero().squeeze(-1)
    total = scalars.new_zeros(len(base)).index_add(0, rank, scalars)
    return log_probs[base] + (total - scalars[base])[:, None]


def gold_loss(
    student_logits: Tensor,
    student_lengths: Tensor,
    student_ids: Tensor,
    student_ends: Tensor,
    teacher_logits: Tensor,
    teacher_lengths: Tensor,
    teacher_ids: Tensor,
    teacher_ends: Tensor,
    merge: str = "last",
) -> Tensor:
    """Compute Σ_v |p_s↓ − p_t↓|, mean over samples and groups: ULD on groups of tokens that stand for the same bytes.

    Of each side: logits (rows, vocabulary) that predict the tokens of the answers, sample after sample; ``lengths``
    (samples,): how many rows of each sample; ``ids`` (rows,): the tokens; ``ends`` (rows,): how many bytes of the
    answer are read after each. All int64. Groups: :func:`same_bytes`; their probabilities: :func:`merge_groups`. A tail
    that one side alone has is left out, and a sample without a group counts nowhere. T = 1.

    The code (TRL) has ``merge="first"`` and the logits at the places of the answer's tokens as its default
    (``observed``), a row too late; ``bayesian`` is ``"last"`` with the rows that are meant here.
    """
    student = (student_logits, student_lengths, student_ids, student_ends)
    teacher = (teacher_logits, teacher_lengths, teacher_ids, teacher_ends)
    values = [sorted_l1(s.exp(), t.exp()) for s, t in _merged(student, teacher, merge)]
    return _mean(values, student_logits)


def gold_hybrid_loss(
    student_logits: Tensor,
    student_lengths: Tensor,
    student_ids: Tensor,
    student_ends: Tensor,
    student_matched: Tensor,
    teacher_logits: Tensor,
    teacher_lengths: Tensor,
    teacher_ids: Tensor,
    teacher_ends: Tensor,
    teacher_matched: Tensor,
    beta: float = 0.0,
    merge: str = "last",
    matched_share: float | None = None,
) -> Tensor:
    """Add w · generalised JSD over the matched ids and (1 − w) · sorted L1 over the rest; mean as in :func:`gold_loss`.

    ``student_matched``, ``teacher_matched`` (m,) int64: ids of the tokens that both vocabularies have, side by side;
    ``beta`` of :func:`~kd.losses.logits.jsd.generalised_js_divergence`: 0 is KL(teacher ‖ student). ``matched_share`` w
    from 0 to 1; None: m / the teacher's vocabulary. The probabilities of the matched part are not normalised, and are
    1e-8 or more. The other arguments: :func:`gold_loss`. T = 1.
    """
    share = len(teacher_matched) / teacher_logits.shape[-1] if matched_share is None else matched_share
    check_share("matched_share", share)
    student = (student_logits, student_lengths, student_ids, student_ends)
    teacher = (teacher_logits, teacher_lengths, teacher_ids, teacher_ends)
    rest_s, rest_t = _without(student_matched, student_logits), _without(teacher_matched, teacher_logits)
    values = []
    for s, t in _merged(student, teacher, merge):
        known_s, known_t = (
            p[:, ids].clamp(min=math.log(FLOOR)) for p, ids in ((s, student_matched), (t, teacher_matched))
        )
        values.append(
            share * js(known_s, known_t, check_share("beta", beta))
            + (1 - share) * sorted_l1(s[:, rest_s].exp(), t[:, rest_t].exp())
        )
    return _mean(values, student_logits)


Side = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, lengths, ids, ends


def _merged(student: Side, teacher: Side, merge: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities of both sides (groups, vocabulary), sample by sample."""
    for side, (logits, lengths, _, _) in (("student", student), ("teacher", teacher)):
        check_lengths(side, logits, lengths)
    parts = [[part.split(side[1].tolist()) for part in (side[0], side[2], side[3])] for side in (student, teacher)]
    for s_logits, s_ids, s_ends, t_logits, t_ids, t_ends in zip(*parts[0], *parts[1], strict=True):
        s_groups, t_groups = same_bytes(s_ends, t_ends)
        s_kept, t_kept = torch.isin(s_groups, t_groups), torch.isin(t_groups, s_groups)
        s, t = (
            F.log_softmax(at_least_float32(z[kept]), dim=-1) for z, kept in ((s_logits, s_kept), (t_logits, t_kept))
        )
        yield (
            merge_groups(s, s_ids[s_kept], s_groups[s_kept], merge),
            merge_groups(t, t_ids[t_kept], t_groups[t_kept], merge),
        )


def _mean(values: list[Tensor], logits: Tensor) -> Tensor:
    """Average over samples the mean over their groups, one tensor (groups,) a sample; 0 where there is none."""
    counts = torch.tensor([len(value) for value in values], device=logits.device)
    samples = torch.arange(len(values), device=logits.device).repeat_interleave(counts)
    return mean_over_samples(torch.cat([logits.new_zeros(0), *values]), samples, len(values))


def _without(matched: Tensor, logits: Tensor) -> Tensor:
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[matched] = False
    return rest


class Gold(Term):
    """:func:`gold_loss` of the logits, for two tokenizers; :func:`gold_hybrid_loss` where their ids are matched.

    Reads of ``batch.extra``, for the student and the same for the teacher, all int64: ``student_lengths`` (samples,),
    how many rows of each sample; ``student_ids`` (rows,), the token that each row predicts; ``student_ends`` (rows,),
    how many bytes are read after it, counted from one place on both sides. With ``student_matched`` and
    ``teacher_matched`` (m,), the ids of the tokens that both vocabularies have, it is the hybrid. A batch without any
    is of one tokenizer: every row is a group, and the mean is over the rows.
    """

    two_tokenizers = True
    reads_softmax_at = 1.0
    over = "samples"

    def __init__(self, merge: str = "last", beta: float = 0.0, matched_share: float | None = None) -> None:
        super().__init__()
        self.merge = check_choice("merge", merge, MERGES)
        self.beta = check_share("beta", beta)
        self.matched_share = None if matched_share is None else check_share("matched_share", matched_share)

    def prepare(self, setup: Setup) -> None:
        """Find out what the mean is over."""
        self.over = "samples" if "student_lengths" in setup.batch.extra else "rows"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over samples and groups."""
        sides = []
        lengths = lengths_of(batch, len(student.logits), len(teacher.logits), student.logits.device)
        for side, output, of_samples in zip(("student", "teacher"), (student, teacher), lengths, strict=True):
            nothing = torch.zeros(len(output.logits), dtype=torch.int64, device=output.logits.device)
            ids, ends = (batch.extra.get(f"{side}_{name}") for name in ("ids", "ends"))
            if (ids is None or ends is None) and f"{side}_lengths" in batch.extra:
                raise ValueError(f"gold needs extra['{side}_ids'] and extra['{side}_ends'] (rows,) in the batch")
            sides.append(
                (output.logits, of_samples, nothing if ids is None else ids, nothing if ends is None else ends)
            )
        matched = [batch.extra.get(f"{side}_matched") for side in ("student", "teacher")]
        if matched[0] is None or matched[1] is None:
            return gold_loss(*sides[0], *sides[1], merge=self.merge)
        return gold_hybrid_loss(*sides[0], matched[0], *sides[1], matched[1], self.beta, self.merge, self.matched_share)
