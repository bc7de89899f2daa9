"""DeiT's distillation token: labels for one head, the teacher for the other, and their mean in evaluation."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.losses import functional as f
from kd.losses.base import Batch, Term
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.dist import Correlation
from kd.losses.logits.dkd import DecoupledDistillation
from kd.losses.logits.hard_label import HardLabel
from kd.parallel import group

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}


def prepared(**terms: Term) -> tuple[Distiller, Batch]:
    torch.manual_seed(0)
    student = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    nn.init.normal_(student.head.weight)
    nn.init.normal_(student.head_dist.weight)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 0]), torch.arange(4))
    module = Distiller(student, teacher, Objective(terms))
    module.prepare(batch)
    return module, batch


def heads(module: Distiller, batch: Batch) -> list[Tensor]:
    student = module.student
    features = student.forward_features(batch.inputs)
    return [student.head(features[:, 0]), student.head_dist(features[:, 1])]


def test_each_head_has_a_teacher_of_its_own() -> None:
    module, batch = prepared(ce=CrossEntropy(), hard_label=HardLabel(), dkd=DecoupledDistillation(), dist=Correlation())
    step = module.losses(batch)
    own, distilled = heads(module, batch)
    goal = module.teacher.networks[0](batch.inputs).detach()
    expected = {
        "ce": f.cross_entropy(own, batch.targets),
        "hard_label": f.hard_label_cross_entropy(distilled, goal),
        "dkd": f.decoupled_kl_divergence(distilled, goal, batch.targets),
        "dist": f.correlation_loss(distilled, goal),
    }
    assert step.counts[0] == (own.argmax(1) == batch.targets).sum()
    for name, value in expected.items():
        torch.testing.assert_close(step.values[name], value, msg=name)
    step.total.backward()
    assert all((p.grad is not None) and p.grad.abs().sum() > 0 for p in module.student.parameters())


def test_several_processes_gather_the_second_head(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = prepared(ce=CrossEntropy(), dist=Correlation())
    monkeypatch.setattr(group, "gather_rows", lambda tensor: torch.cat([tensor, tensor.flip(0)]))
    shares = group.Shares(*(torch.tensor(1.0) for _ in range(4)))
    monkeypatch.setattr(group, "shares", lambda *_: shares)
    both = [torch.cat([z, z.flip(0)]) for z in (heads(module, batch)[1], module.teacher.networks[0](batch.inputs))]
    torch.testing.assert_close(module.losses(batch).values["dist"], f.correlation_loss(*both))


def test_the_mean_of_both_heads_is_evaluated() -> None:
    module, batch = prepared(ce=CrossEntropy(), hard_label=HardLabel())
    answer = module.deployed.eval()(batch.inputs)
    torch.testing.assert_close(answer, sum(heads(module, batch)) / 2)
    plain = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    plain.load_state_dict(module.deployed.state_dict())
    torch.testing.assert_close(plain.eval()(batch.inputs), answer)


@pytest.mark.parametrize("terms", [{"ce": CrossEntropy()}, {"hard_label": HardLabel()}])
def test_terms_of_one_kind_train_the_mean(terms: dict[str, Term]) -> None:
    """A head that nothing trains would be half of the answer."""
    module, batch = prepared(**terms)
    module.losses(batch).total.backward()
    assert module.student.head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(module.student.head.bias.grad, module.student.head_dist.bias.grad)
