"""Segmentation: which pixels are rows, at which resolution, and metrics against torchmetrics and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.losses.dense.cwd import ChannelWiseDivergence
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.tasks.base import Want
from kd.tasks.segmentation import Segmentation

CLASSES = 5  # of which no mask and no answer has 4
SIZE = (6, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(count: int = 3, seed: int = 1) -> Tensor:
    """Class ids 0 to 3, and 255 in a column."""
    found = torch.randint(0, 4, (count, *SIZE), generator=torch.Generator().manual_seed(seed))
    found[:, :, 2] = 255
    return found


def maps(count: int = 3, seed: int = 2) -> Tensor:
    found = 2 * random(count, CLASSES, *SIZE, seed=seed)
    found[:, 4] = -50
    return found


def measured(task: Segmentation, *parts: tuple[Tensor, Tensor, Tensor | None]) -> dict[str, float]:
    """The metrics of batches: maps of the student, masks, maps of the teacher."""
    meter = task.meter(CLASSES)
    for student, targets, teacher in parts:
        batch = task.rows(Batch(random(len(targets), 3, *SIZE), targets))
        own, other = (
            None if m is None else task.answer(lambda _, m=m: m, batch.inputs, batch, Want())
            for m in (student, teacher)
        )
        meter.update(own, batch, other)
    return meter.compute(parts[0][2] is not None)


# ---------------------------------------------------------------------- rows


def test_rows_are_the_valid_pixels_in_their_order() -> None:
    task, targets, logits = Segmentation(), masks(), maps()
    batch = task.rows(Batch(random(3, 3, *SIZE), targets))
    assert task.rows(batch) is batch
    kept = [(b, y, x) for b in range(3) for y in range(SIZE[0]) for x in range(SIZE[1]) if x != 2]
    assert batch.targets.tolist() == [int(targets[place]) for place in kept]
    rows = task.answer(lambda inputs: logits, batch.inputs, batch, Want()).logits
    assert torch.equal(rows, torch.stack([logits[b, :, y, x] for b, y, x in kept]))


def test_without_ignored_pixels_all_are_rows_and_without_targets_those_of_the_inputs() -> None:
    task, logits = Segmentation(ignore_index=99), maps()
    targets = masks().clamp(max=3)
    for batch in (task.rows(Batch(random(3, 3, *SIZE), targets)), Batch(random(3, 3, *SIZE))):
        rows = task.answer(lambda inputs: logits, batch.inputs, batch, Want()).logits
        assert torch.equal(rows, logits.permute(0, 2, 3, 1).reshape(-1, CLASSES))


def test_low_resolution_is_resized_bilinearly_without_aligned_corners() -> None:
    task, targets = Segmentation(), masks()
    batch = task.rows(Batch(random(3, 3, 12, 14), targets))  # the mask's size counts, not the image's
    coarse = random(3, CLASSES, 3, 4)
    rows = task.answer(lambda inputs: coarse, batch.inputs, batch, Want()).logits
    expected = F.interpolate(coarse, SIZE, mode="bilinear", align_corners=False).movedim(1, -1)[targets != 255]
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("raw", [{"out": maps(), "aux": random(1)}, (maps(), random(1)), {"logits": maps()}])
def test_the_map_is_found_in_what_other_libraries_answer(raw: Any) -> None:
    batch = Batch(random(3, 3, *SIZE))
    assert Segmentation().answer(lambda inputs: raw, batch.inputs, batch, Want()).logits.shape == (3 * 42, CLASSES)


def test_what_is_no_mask_and_what_is_no_map_are_refused() -> None:
    task = Segmentation()
    with pytest.raises(KdError, match=r"^task = segmentation needs .*: the data gives targets int64 \(3,\)$"):
        task.rows(Batch(random(3, 3, *SIZE), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(KdError, match=r"targets float32 \(3, 6, 7\)"):
        task.rows(Batch(random(3, 3, *SIZE), masks().float()))
    batch = task.rows(Batch(random(3, 3, *SIZE), masks()))
    with pytest.raises(KdError, match=r"this one answers \(samples, 5\): choose one .* model@student=timm_unet"):
        task.answer(lambda inputs: random(3, 5), batch.inputs, batch, Want())
    with pytest.raises(ValueError, match=r"^background = -1 is not allowed"):
        Segmentation(background=-1)
    with pytest.raises(KdError, match=r"^task.background = 7 is not allowed: the classes are 0 to 4$"):
        Segmentation(background=7).meter(CLASSES)


# ---------------------------------------------------------------------- losses


class Pixelwise(nn.Module):
    """A map of logits by a 1×1 convolution, at half the resolution."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.classifier = nn.Conv2d(3, width, 2, stride=2), nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images).relu())


def test_losses_on_pixels_are_those_by_hand_and_cwd_is_on_the_maps() -> None:
    terms = {
        "ce": CrossEntropy(),
        "kd": KnowledgeDistillation(2.0),
        "cwd": ChannelWiseDivergence(["classifier"], ["classifier"], 4.0, "identity"),
    }
    student, teacher = Pixelwise(4, 0), Pixelwise(8, 1)
    module = Distiller(student, teacher, Objective(terms), Segmentation(), CLASSES)
    images, targets = random(3, 3, 8, 8), torch.randint(0, CLASSES, (3, 8, 8))
    targets[:, 0], targets[0, 1] = 255, UNLABELLED
    batch = Batch(images, targets)
    module.prepare(batch)
    step = module.losses(module.task.rows(batch))

    own, other = (F.interpolate(n(images), (8, 8), mode="bilinear") for n in (student, teacher))
    valid, labelled = targets != 255, (targets != 255) & (targets != UNLABELLED)
    ce = F.cross_entropy(own.movedim(1, -1)[labelled], targets[labelled])
    soft, hard = (m.movedim(1, -1)[valid] / 2.0 for m in (own, other))
    kd = 4 * F.kl_div(soft.log_softmax(1), hard.log_softmax(1), reduction="batchmean", log_target=True)
    low, high = ((n(images).flatten(2) / 4.0).log_softmax(2) for n in (student, teacher))
    cwd = 16 * (high.exp() * (high - low)).sum() / (3 * CLASSES)
    for name, expected in {"ce": ce, "kd": kd, "cwd": cwd}.items():
        torch.testing.assert_close(step.values[name], expected, msg=name)
    assert (step.rows, int(step.labelled)) == (int(valid.sum()), int(labelled.sum()))
    torch.testing.assert_close(step.total, ce + kd + cwd)


def test_cwd_on_features_through_the_adapter_of_the_authors_code() -> None:
    term = ChannelWiseDivergence(["classifier:input"], ["classifier:input"], 2.0, "conv_bn_relu")
    student, teacher = Pixelwise(4, 0), Pixelwise(8, 1)
    module = Distiller(student, teacher, Objective({"cwd": term}), Segmentation(), CLASSES)
    batch = Batch(random(3, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64))
    module.prepare(batch)
    assert term.over == "batch"  # batch norm: its statistics are those of all processes
    value = module.losses(module.task.rows(batch)).values["cwd"]
    own, other = (n.body(batch.inputs).relu() for n in (student, teacher))
    (weight,) = (m.weight for m in term.modules() if isinstance(m, nn.Conv2d))
    adapted = F.batch_norm(F.conv2d(own, weight), None, None, training=True).relu()
    low, high = ((m.flatten(2) / 2.0).log_softmax(2) for m in (adapted, other))
    torch.testing.assert_close(value, 4 * (high.exp() * (high - low)).sum() / (3 * 8))


@pytest.mark.parametrize(("terms", "kept"), [(["ce"], 1), (["ce", "kd"], 3)])
def test_a_step_keeps_one_matrix_of_rows_and_classes_for_ce_and_two_more_for_kd(terms: list[str], kept: int) -> None:
    task, coarse, beside = Segmentation(), random(2, 19, 8, 8).requires_grad_(), random(2, 19, 8, 8, seed=1)
    batch = task.rows(Batch(random(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        own, other = (task.answer(lambda _, m=m: m, batch.inputs, batch, Want()) for m in (coarse, beside))
        made = {"ce": CrossEntropy(), "kd": KnowledgeDistillation()}
        _, total = Objective({name: made[name] for name in terms})(own, other, batch)
    total.backward()
    matrix = len(batch.targets) * 19 * 4
    assert sum(size >= matrix for size in saved.values()) == kept


def test_a_batch_without_a_valid_pixel_costs_nothing() -> None:
    task, logits = Segmentation(), maps().requires_grad_()
    batch = task.rows(Batch(random(3, 3, *SIZE), torch.full((3, *SIZE), 255)))
    student = task.answer(lambda inputs: logits, batch.inputs, batch, Want())
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()})
    _, total = objective(student, student.detach(), batch)
    total.backward()
    assert total == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_cwd_refuses_layouts_that_it_cannot_compare() -> None:
    class Flat(Pixelwise):
        def forward(self, images: Tensor) -> Tensor:
            found = super().forward(images)
            self.pooled(found.mean((2, 3)))
            return found

    flat = Flat(4, 0)
    flat.pooled = nn.Linear(CLASSES, 3)
    terms = {"cwd": ChannelWiseDivergence(["pooled"], ["body"])}
    module = Distiller(flat, Pixelwise(8, 1), Objective(terms), Segmentation(), CLASSES)
    with pytest.raises(
        KdError, match=r"^loss.cwd: cwd cannot compare student tap pooled \(vector: 3\) with teacher tap"
    ):
        module.prepare(Batch(random(3, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64)))


# ---------------------------------------------------------------------- metrics


def test_metrics_are_those_of_torchmetrics_over_the_whole_split() -> None:
    parts = [(maps(3, 2), masks(3, 1), maps(3, 5)), (maps(2, 3), masks(2, 4), maps(2, 6))]
    found = measured(Segmentation(), *parts)
    logits, targets, others = (torch.cat(side) for side in zip(*parts, strict=True))
    answer, more = logits.argmax(1), {"num_classes": CLASSES, "ignore_index": 255}
    miou = multiclass_jaccard_index(answer, targets, average="macro", **more)
    assert found["miou"] == pytest.approx(float(miou), rel=1e-6)
    accuracy = multiclass_accuracy(answer, targets, average="micro", **more)
    assert found["pixel_accuracy"] == pytest.approx(float(accuracy), rel=1e-6)
    valid = targets != 255
    two = [(t[valid] != 0).long() for t in (answer, targets)]
    foreground = multiclass_jaccard_index(*two, num_classes=2, average="none")[1]
    assert found["foreground_iou"] == pytest.approx(float(foreground), rel=1e-6)
    rows = [m.movedim(1, -1)[valid] for m in (logits, others)]
    assert found["nll"] == pytest.approx(float(F.cross_entropy(rows[0], targets[valid])), rel=1e-5)
    agreement = (rows[0].argmax(1) == rows[1].argmax(1)).float().mean()
    assert found["agreement"] == pytest.approx(float(agreement))
    log_s, log_t = (m.log_softmax(1) for m in rows)
    assert found["kl"] == pytest.approx(float((log_t.exp() * (log_t - log_s)).sum(1).mean()), rel=1e-4)


def test_a_class_that_is_nowhere_counts_for_nothing_one_that_is_answered_wrongly_counts_as_0() -> None:
    targets = torch.tensor([[[0, 0, 1, 255]]])
    answers = torch.tensor([[[0, 2, 1, 3]]])  # class 2 is answered once, class 3 on an ignored pixel, class 4 never
    logits = F.one_hot(answers, CLASSES).movedim(-1, 1).float()
    task = Segmentation()
    meter = task.meter(CLASSES)
    batch = task.rows(Batch(random(1, 3, 1, 4), targets))
    meter.update(task.answer(lambda inputs: logits, batch.inputs, batch, Want()), batch)
    found = meter.compute(False)
    assert found["miou"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["foreground_iou"] == pytest.approx(1 / 2)
    assert found["pixel_accuracy"] == pytest.approx(2 / 3)
    assert meter.per_class() == pytest.approx([0.5, 1.0, 0.0, float("nan"), float("nan")], nan_ok=True)


def test_the_foreground_is_a_choice() -> None:
    one, other = (measured(Segmentation(background=b), (maps(), masks(), None)) for b in (0, None))
    assert set(one) - set(other) == {"foreground_iou"}
    assert Segmentation(background=None).metrics[0].name == "miou"


def test_metrics_of_halves_are_those_of_the_whole() -> None:
    parts = [(maps(3, 2), masks(3, 1), maps(3, 5)), (maps(2, 3), masks(2, 4), maps(2, 6))]
    together = tuple(torch.cat(side) for side in zip(*parts, strict=True))
    apart, whole = measured(Segmentation(), *parts), measured(Segmentation(), together)
    assert {k: apart[k] for k in ("miou", "foreground_iou", "pixel_accuracy")} == {
        k: whole[k] for k in ("miou", "foreground_iou", "pixel_accuracy")
    }
    assert apart == pytest.approx(whole, rel=1e-5)


def test_pixels_without_a_label_count_beside_the_teacher_only() -> None:
    targets, logits = masks(), maps()
    hidden = targets.clone()
    hidden[0] = torch.where(targets[0] == 255, 255, UNLABELLED)
    found, rest = measured(Segmentation(), (logits, hidden, maps(seed=5))), (logits[1:], targets[1:], maps(seed=5)[1:])
    alone, all_ = measured(Segmentation(), rest), measured(Segmentation(), (logits, targets, maps(seed=5)))
    assert {k: found[k] for k in ("miou", "nll")} == pytest.approx({k: alone[k] for k in ("miou", "nll")})
    assert {k: found[k] for k in ("agreement", "kl")} == pytest.approx({k: all_[k] for k in ("agreement", "kl")})


def test_training_counts_right_pixels() -> None:
    task, logits, targets = Segmentation(), maps(), masks()
    targets[0] = UNLABELLED
    batch = task.rows(Batch(random(3, 3, *SIZE), targets))
    (right,) = task.count(task.answer(lambda inputs: logits, batch.inputs, batch, Want()), batch)
    assert int(right) == int((logits.argmax(1) == targets).sum())
    (nothing,) = task.count(Output(logits.flatten(1)), Batch(batch.inputs))
    assert nothing == 0


def test_a_teacher_that_is_not_trained_or_sees_other_images_is_doubted() -> None:
    task = Segmentation()
    assert "is it trained?" in task.doubt({"miou": 0.19}, {}, 5)
    assert "30.0% in its own run" in task.doubt({"miou": 0.22}, {"miou": 0.3}, 5)
    assert task.doubt({"miou": 0.28}, {"miou": 0.3}, 5) == ""
