"""Deep mutual learning: Zhang et al., Deep Mutual Learning, CVPR 2018, arXiv 1706.00384."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kd.config.rules import FLAG, refusals, refuse
from kd.distill.distiller import Distiller, Step
from kd.distill.optimisation import EVERY_PEER
from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.tasks.base import Want


class Mutual(Distiller):
    """Trains the student and its peers (``networks.NAME``) together: each learns from the labels and from the others.

    Network k of K minimises the objective on its own answer with each of the others in the teacher's place, the mean of
    these K − 1 (Eqs. 5 and 6 of two networks, 7 of more). With ``loss=[ce,kd]`` and T = 1, as published, that is its
    cross-entropy plus the mean of KL(other ‖ own). Other losses of logits work as well. ``ensemble``: one teacher for
    each network, the mean of the others' probabilities (Eq. 8), which the paper found to be worse.

    No gradient goes through the answer that teaches. Each network has an optimiser and a schedule of the recipe, or of
    ``recipe.networks.NAME``. All step at once, from answers of the same weights; in the paper's algorithm they step one
    after the other, each by fresh answers. The student is what validation selects, and what is tested and exported; the
    peers are measured and kept as they are after the last epoch. Losses of a peer are logged as ``NAME/…``.

    ``KdError`` without a peer, with a teacher, and for terms that read more than logits and labels, or keep something.
    """

    supplies_teacher = True
    own_optimizers = (EVERY_PEER,)
    peers_answer = True

    def __init__(self, *args: Any, ensemble: bool = False, **kwargs: Any) -> None:
        refuse(refusals("distiller.", locals(), {"ensemble": FLAG}))
        super().__init__(*args, **kwargs)
        self.ensemble = ensemble
        if not self.peers:
            raise KdError("distiller = mutual needs a second network: set networks.peer, such as ${student.model}")
        if self.teacher is not None:
            raise KdError("distiller = mutual has no teacher, its networks teach one another: leave teacher out")
        if not self.objective.needs("teacher"):
            raise KdError(
                "distiller = mutual needs a term that compares two networks, or none learns from another: "
                "loss=[ce,kd] loss.kd.temperature=1, as published"
            )
        for name, term in self.objective.items():
            taps = [sides for sides in (term.student_taps, term.teacher_taps) if sides is None or len(sides)]
            if taps or term.needs_views or term.needs_input_gradient:
                read = "intermediate tensors" if taps else "views" if term.needs_views else "gradients of the inputs"
                raise KdError(
                    f"loss.{name} reads {read}, and distiller = mutual compares logits alone: use terms of logits, "
                    "loss=[ce,kd]"
                )

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Prepare as every distiller, then refuse terms with weights or banks: they would be those of all networks."""
        super().prepare(*args, **kwargs)
        for name, term in self.objective.items():
            if kept := list(term.state_dict()):
                raise KdError(
                    f"loss.{name} keeps {kept[0]} over the steps, and distiller = mutual has it compare several pairs "
                    "of networks: use a term that keeps nothing"
                )

    def answer_of_teacher(self, batch: Batch) -> Output:
        """Answer by the first peer: what the student learns from in the dry pass."""
        return self._answers_of_peers(batch)[next(iter(self.peers))]

    def losses(self, batch: Batch) -> Step:
        """Compute one step of all networks: the sum of their objectives, each of which reaches one network alone."""
        answers = {"": self.answer_of_student(batch), **self._answers_of_peers(batch)}
        total, *others = (self._step(name, answers, batch) for name in answers)
        for name, step in zip(self.peers, others, strict=True):
            total = total.beside(step, name)
        return total

    def _answers_of_peers(self, batch: Batch) -> dict[str, Output]:
        return {
            name: self.task.answer(peer, batch.inputs, batch, Want(logits=True)) for name, peer in self.peers.items()
        }

    def _step(self, name: str, answers: Mapping[str, Output], batch: Batch) -> Step:
        """Compute the objective of one network, the mean over those that teach it."""
        others = [output.detach() for other, output in answers.items() if other != name]
        if self.ensemble:
            others = [mean_answer(others)]
        steps = [self.score(answers[name], other, batch) for other in others]
        total = torch.stack([step.total for step in steps]).mean()
        values = {key: torch.stack([step.values[key] for step in steps]).mean() for key in steps[0].values}
        return replace(steps[0], total=total, values=values)


def mean_answer(outputs: Sequence[Output]) -> Output:
    """Make the output whose softmax is the mean of those of several."""
    logs = torch.stack([output.logits.float().log_softmax(-1) for output in outputs])
    return Output(logs.logsumexp(0) - torch.tensor(float(len(outputs)), device=logs.device).log())
