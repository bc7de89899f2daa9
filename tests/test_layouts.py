"""Layouts from the network to the term: recorded views, adapters between maps and tokens, refusals, attention maps."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses.adapters import Convert, match
from kd.losses.base import Batch, Output, Setup, Term
from kd.losses.features.at import AttentionTransfer
from kd.losses.features.hint import Hint
from kd.losses.functional import attention_transfer
from kd.losses.layouts import NCHW, UNKNOWN, VECTOR, Layout, Tapped, map_to_tokens, resample, tokens_to_map
from kd.models.cifar_resnet import resnet
from kd.tasks.classification import Classification

SHAPE = (3, 32, 32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def swin(width: int = 8) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": width, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)


def vit(patch: int = 8, **arguments: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": patch, "embed_dim": 16, "depth": 2, "num_heads": 2, **arguments}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)


def conv() -> nn.Module:
    return resnet(8, (4, 4, 6, 8), num_classes=3, input_shape=SHAPE)


def batch() -> Batch:
    return Batch(torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 0]), torch.arange(4))


def distiller(student: nn.Module, teacher: nn.Module, term: Term, name: str = "term") -> Distiller:
    task, optimizer = Classification(), partial(torch.optim.SGD, lr=0.1)
    made = Distiller(student, Teacher([teacher]), Objective({name: term}, {name: 1.0}), task, 3, optimizer)
    made.prepare(batch())
    return made


# ---------------------------------------------------------------------- terms see (B, C, H, W)


def test_at_on_swin_is_at_on_permuted_maps() -> None:
    student, teacher, data = swin(8), swin(12), batch()
    made = distiller(student, teacher, AttentionTransfer())
    made.student.eval()  # no dropped paths
    value = made.losses(made.task.rows(data)).total
    maps: dict[str, list[Tensor]] = {"layers.0": [], "layers.1": []}
    for network in (student, teacher.eval()):
        for name, found in maps.items():
            network.get_submodule(name).register_forward_hook(lambda m, a, output, found=found: found.append(output))
        network(data.inputs)
    pairs = [[f.permute(0, 3, 1, 2).contiguous() for f in found] for found in maps.values()]
    torch.testing.assert_close(value, torch.stack([attention_transfer(s, t) for s, t in pairs]).sum())
    wrong = torch.stack([attention_transfer(s, t) for s, t in maps.values()]).sum()
    assert not torch.isclose(value, wrong, rtol=1e-2)


def test_a_map_is_recorded_as_a_view() -> None:
    made = distiller(swin(), conv(), AttentionTransfer(["layers.0"], ["layer3"]))
    output = made.answer_both(made.task.rows(batch()))[1]
    feature = output.features["layers.0"]
    assert feature.shape == (4, 8, 8, 8)
    assert feature.stride()[1] == 1  # the channels lie side by side, as the network made them
    assert made.student_taps.layouts == {"layers.0": NCHW}


class Told(Term):
    """Keeps what it is told."""

    def __init__(self, student_taps: list[str], teacher_taps: list[str]) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def prepare(self, setup: Setup) -> None:
        self.setup = setup

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return student.logits.mean()


def test_the_setup_tells_layouts_of_both_sides() -> None:
    term = Told(["layers.1", "head.fc:input"], ["blocks.0", "patch_embed", "blocks.1@tokens2"])
    distiller(swin(), vit(), term)
    assert term.setup.layouts == {
        "student": {"layers.1": NCHW, "head.fc:input": VECTOR},
        "teacher": {
            "blocks.0": Layout("tokens", 1),
            "patch_embed": Layout("tokens"),
            "blocks.1@tokens2": Layout("tokens", 2),
        },
    }


# ---------------------------------------------------------------------- pairs of unequal layouts


@pytest.mark.parametrize(
    ("student", "teacher", "s", "t"),
    [
        (conv, vit, "layer3", "blocks.0"),
        (vit, conv, "blocks.0", "layer3"),
        (vit, partial(vit, patch=4, embed_dim=24), "blocks.0", "blocks.1"),  # 17 and 65 tokens
        (partial(vit, patch=4), partial(vit, class_token=False, global_pool="avg"), "blocks.0", "blocks.1"),
        (swin, vit, "layers.0", "blocks.0"),
        (vit, swin, "blocks.0", "layers.0"),
        (conv, swin, "layer3", "layers.1"),
    ],
)
@pytest.mark.parametrize("term", [Hint, AttentionTransfer])
def test_unequal_layouts_train(student, teacher, s: str, t: str, term) -> None:
    made = distiller(student(), teacher(), term([s], [t]))
    optimizer = torch.optim.SGD(made.trainable(), lr=0.05)
    data, losses = batch(), []
    for _ in range(3):
        optimizer.zero_grad()
        total = made.losses(made.task.rows(data)).total
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.objective.parameters())
        optimizer.step()
        losses.append(total.item())
    assert losses[2] < losses[0]


def tap(side: str, shape: tuple[int, ...], layout: Layout) -> Tapped:
    return Tapped(side, side[0], shape, layout)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "compared"),
    [
        ("auto", ((2, 3, 4, 4), NCHW), ((2, 5, 7, 7), NCHW), (2, 5, 7, 7)),
        ("auto", ((2, 3, 4, 4), NCHW), ((2, 10, 5), Layout("tokens", 1)), (2, 9, 5)),
        ("auto", ((2, 17, 3), Layout("tokens", 1)), ((2, 10, 5), Layout("tokens", 1)), (2, 10, 5)),
        ("auto", ((2, 18, 3), Layout("tokens", 2)), ((2, 10, 5), Layout("tokens", 1)), (2, 9, 5)),
        ("auto", ((2, 9, 3), Layout("tokens", 2)), ((2, 8, 5), Layout("tokens", 1)), (2, 7, 5)),  # no grid is needed
        ("auto", ((2, 9, 3), Layout("tokens", 1)), ((2, 9, 5), Layout("tokens", 1)), (2, 9, 5)),
        ("auto", ((2, 17, 3), Layout("tokens", 1)), ((2, 5, 7, 7), NCHW), (2, 5, 7, 7)),
        ("conv", ((2, 17, 3), Layout("tokens", 1)), ((2, 5, 5), Layout("tokens", 1)), (2, 5, 2, 2)),
        ("linear", ((2, 17, 3), Layout("tokens", 1)), ((2, 5, 7, 7), NCHW), (2, 49, 5)),
        ("linear", ((2, 4, 9, 9), UNKNOWN), ((2, 4, 9, 9), UNKNOWN), None),
        ("identity", ((2, 4, 9, 9), UNKNOWN), ((2, 4, 9, 9), UNKNOWN), (2, 4, 9, 9)),
    ],
)
def test_both_sides_meet(kind, student, teacher, compared) -> None:
    if compared is None:
        with pytest.raises(ValueError, match="student tap s"):
            match("hint", kind, tap("student", *student), tap("teacher", *teacher))
        return
    adapter, goal = match("hint", kind, tap("student", *student), tap("teacher", *teacher))
    assert adapter(torch.randn(student[0])).shape == goal(torch.randn(teacher[0])).shape == compared
    assert not list(goal.parameters())


def test_tokens_and_maps_are_rows_of_one_grid() -> None:
    feature = torch.randn(2, 5, 3, 3)
    tokens = torch.cat([torch.randn(2, 2, 5), map_to_tokens(feature)], dim=1)
    assert torch.equal(tokens[0, 2 + 1 * 3 + 2], feature[0, :, 1, 2])
    assert torch.equal(tokens_to_map(tokens, 2), feature)
    with pytest.raises(ValueError, match="11 tokens with 0 prefix tokens are no square grid"):
        tokens_to_map(tokens)


def test_the_class_token_takes_part_where_both_have_one() -> None:
    tokens = torch.randn(2, 17, 3)
    found = Convert(Layout("tokens", 1), "tokens", (2, 2), keep_prefix=True)(tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    torch.testing.assert_close(tokens_to_map(found, 1), nn.functional.avg_pool2d(tokens_to_map(tokens, 1), 2))


def test_resample() -> None:
    feature = torch.randn(2, 3, 6, 4)
    assert resample(feature, (6, 4)) is feature
    torch.testing.assert_close(resample(feature, (3, 2)), nn.functional.avg_pool2d(feature, 2))
    assert resample(feature, (7, 2)).shape == (2, 3, 7, 2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("student", "s", "t", "term", "sentence"),
    [
        (
            conv,
            "layer3",
            "head:input",
            Hint,
            r"tap layer3 \(NCHW: .*teacher tap head:input \(vector: 16\): tap the",
        ),
        (
            conv,
            "fc:input",
            "blocks.0",
            AttentionTransfer,
            r"fc:input \(vector: 8\) with teacher tap blocks\.0 \(tok",
        ),
        (vit, "blocks.0.attn.qkv", "blocks.0", Hint, r"unknown layout.*student_taps=\[blocks\.0\.attn\.qkv@tokens\]"),
        (conv, "layer3", "blocks.0@tokens", AttentionTransfer, None),
        (conv, "layer3", "blocks.0@tokens2", AttentionTransfer, r"blocks\.0 has no square grid.*blocks\.0@tokens1"),
        (conv, "layer3", "blocks.0@NCHW", AttentionTransfer, r"teacher tap blocks\.0@NCHW has shape .* 4 dimensions"),
        (conv, "layer3", "blocks.0@maps", AttentionTransfer, r"layout = maps is not allowed: it must be NCHW, NHWC"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_batch(student, s, t, term, sentence) -> None:
    if sentence is None:
        distiller(student(), vit(), term([s], [t]))
        return
    with pytest.raises(KdError, match=sentence) as caught:
        distiller(student(), vit(), term([s], [t]))
    assert "\n" not in str(caught.value)


class AttentionHint(Hint):
    needs_attention_maps = True


def test_hint_refuses_attention_maps_unless_the_adapter_is_chosen() -> None:
    name = "blocks.0.attn.attn_drop"
    with pytest.raises(
        KdError, match=rf"^loss\.term: hint cannot compare student tap {name} \(unknown layout: 2 × 17 × 17"
    ):
        distiller(vit(), vit(), AttentionHint([name], [name]))
    distiller(vit(), vit(), AttentionHint([name], [name], adapter="identity"))


# ---------------------------------------------------------------------- attention maps


def test_fused_attention_is_switched_off_where_maps_are_read(caplog) -> None:
    student, teacher, name = vit(), vit(), "blocks.1.attn.attn_drop"
    with caplog.at_level(logging.INFO, logger="kd"):
        made = distiller(student, teacher, AttentionHint([name], [name], adapter="identity"), "maps")
    said = [r.getMessage() for r in caplog.records if "fused" in r.getMessage()]
    assert said == [
        f"loss.maps reads attention maps: fused attention is off in the {side}'s blocks.1.attn"
        for side in ("student", "teacher")
    ]
    assert [student.blocks[i].attn.fused_attn for i in (0, 1)] == [True, False]
    maps = made.answer_both(made.task.rows(batch()))[0].features[name]
    torch.testing.assert_close(maps.sum(-1), torch.ones(4, 2, 17))
    with pytest.raises(KdError, match=r"did not fire: blocks\.0\.attn uses fused attention"):
        distiller(vit(), vit(), Hint(["blocks.0.attn.attn_drop"], ["blocks.0"]))
