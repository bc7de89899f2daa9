"""``loss.NAME.standardise=true``: any logit loss of z-scores, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.config.compose import checked
from kd.distill.fused import form_of
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses import functional as f
from kd.losses.base import Batch, Output, TopK
from kd.losses.features.at import AttentionTransfer
from kd.losses.logits.dist import Correlation
from kd.losses.logits.kd import KnowledgeDistillation
from kd.parallel import group
from kd.run import build
from kd.run.loss_nodes import complete

TARGETS = torch.tensor([1, 0, 4, -1])


@pytest.fixture
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 5, dtype=torch.float64), 3 * torch.randn(4, 5, dtype=torch.float64)


def values(objective: Objective, sides, batch: Batch) -> dict[str, float]:
    found, _ = objective(Output(sides[0]), Output(sides[1]), batch)
    return {name: float(value) for name, value in zip(objective.names, found, strict=True)}


def test_z_scores_in_numpy(sides) -> None:
    z = sides[0].numpy()
    expected = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(f.standardised_logits(sides[0]).numpy(), expected, rtol=1e-12)
    tokens = sides[0].view(2, 2, 5)
    np.testing.assert_allclose(f.standardised_logits(tokens).view(4, 5).numpy(), expected, rtol=1e-12)


def test_any_term_of_a_config(sides) -> None:
    """On the command line and from Python; cross-entropy stays with the logits themselves."""
    chosen = ["loss=[ce,kd,dkd,nkd,dist]", *(f"loss.{n}.standardise=true" for n in ("kd", "dkd", "nkd", "dist"))]
    config = checked([*chosen, "loss.kd.temperature=2", "model@teacher=mlp", "teacher.allow_random=true"])
    batch = Batch(torch.zeros(4, 1), TARGETS)
    found = values(build.objective(config), sides, batch)
    z = [f.standardised_logits(side) for side in sides]
    expected = {
        "ce": f.cross_entropy(sides[0], TARGETS),
        "kd": f.kl_divergence(*z, 2.0),
        "dkd": f.decoupled_kl_divergence(*z, TARGETS),
        "nkd": f.normalised_cross_entropy(*z, TARGETS),
        "dist": f.correlation_loss(*z),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    python = {"loss": complete({"ce": 1.0, "kd": {"weight": 9, "standardise": True, "temperature": 2.0}})}
    assert values(build.objective(python), sides, batch)["kd"] == pytest.approx(found["kd"], rel=1e-12)


def test_the_students_scale_and_shift_do_not_matter(sides) -> None:
    objective = Objective({"kd": KnowledgeDistillation()}, standardise=["kd"])
    one, other = (values(objective, s, Batch(torch.zeros(4, 1))) for s in (sides, (7 * sides[0] + 3, sides[1])))
    assert one == pytest.approx(other, rel=1e-6)


def test_a_term_of_two_objectives_is_standardised_once(sides) -> None:
    """And it is no longer made from hidden states without its logits."""
    term = KnowledgeDistillation(2.0)
    assert form_of(term) is not None
    for _ in range(2):
        objective = Objective({"kd": term}, standardise=["kd"])
    assert form_of(term) is None
    expected = f.kl_divergence(*map(f.standardised_logits, sides), 2.0)
    assert values(objective, sides, Batch(torch.zeros(4, 1)))["kd"] == pytest.approx(float(expected), rel=1e-12)


def test_rows_of_all_processes_are_standardised(sides, monkeypatch) -> None:
    monkeypatch.setattr(group, "gather_rows", lambda tensor: torch.cat([tensor, tensor.flip(0)]))
    objective = Objective({"dist": Correlation()}, standardise=["dist"])
    shares = group.Shares(*(torch.tensor(1.0) for _ in range(4)))
    found, _ = objective(Output(sides[0]), Output(sides[1]), Batch(torch.zeros(4, 1)), shares=shares)
    both = [torch.cat([z, z.flip(0)]) for z in map(f.standardised_logits, sides)]
    torch.testing.assert_close(found[0], f.correlation_loss(*both))


@pytest.mark.parametrize("constant", [0.0, 3.7, -1e4])
def test_equal_logits_of_a_row_make_no_large_gradient(constant: float) -> None:
    """A classifier that begins with zeros: σ is 0 but for rounding, and 1 / σ would be 10⁷."""
    student = torch.full((3, 7), constant, requires_grad=True)
    loss = f.kl_divergence(f.standardised_logits(student), f.standardised_logits(torch.randn(3, 7)), 2.0)
    loss.backward()
    assert loss.isfinite()
    assert 0 < student.grad.abs().max() < 1


def test_what_cannot_be_standardised_is_refused(sides) -> None:
    with pytest.raises(KdError, match=r"^loss\.at\.standardise = true is not allowed: the term reads no logits$"):
        Objective({"at": AttentionTransfer()}, standardise=["at"])
    with pytest.raises(KdError, match=r"loss\.kd\.standardise = 3 is not allowed: it must be true or false"):
        checked(["loss=[kd]", "loss.kd.standardise=3", "model@teacher=mlp", "teacher.allow_random=true"])
    few = Output(topk=TopK(torch.tensor([[0]]), torch.tensor([[-0.1]]), 5))
    with pytest.raises(KdError, match="needs all logits of the teacher"):
        Objective({"kd": KnowledgeDistillation()}, standardise=["kd"])(Output(sides[0][:1]), few, Batch(torch.zeros(1)))
