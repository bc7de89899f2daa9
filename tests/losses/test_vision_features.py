"""Methods on features and relations: what must hold of each, banks and queues, heads that stay, taps, refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.distill.taps import resolve
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses import functional as f
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term
from kd.losses.dense.cwd import ChannelWiseDivergence
from kd.losses.dense.mgd import Generation
from kd.losses.features._class_maps import class_activation_maps
from kd.losses.features.cat_kd import ClassAttentionTransfer
from kd.losses.features.fsp import FlowOfSolution
from kd.losses.features.ft import FactorTransfer
from kd.losses.features.kdsvd import SingularVectorRelations
from kd.losses.features.ofd import OverhaulDistillation
from kd.losses.features.reviewkd import KnowledgeReview
from kd.losses.features.scalekd import CrossAttentionProjector, ScaleDistillation
from kd.losses.features.semckd import Embedding, SemanticCalibration
from kd.losses.features.simkd import ReusedClassifier
from kd.losses.features.srrl import SoftmaxRegression
from kd.losses.features.theia import FeatureTranslation
from kd.losses.features.vid import VariationalInformation
from kd.losses.features.vitkd import TokenGeneration, ViTDistillation
from kd.losses.features.vkd import OrthogonalProjection
from kd.losses.relations._queue import Queue
from kd.losses.relations._rows import Rows
from kd.losses.relations.cc import CorrelationCongruence
from kd.losses.relations.crd import Contrast, ContrastiveDistillation
from kd.losses.relations.lightly_v1 import QueueSimilarity
from kd.losses.relations.lightly_v3 import TokenSimilarity
from kd.losses.relations.rkd import Relational
from kd.losses.relations.rrd import RelationalRepresentation
from kd.losses.relations.sp import SimilarityPreserving
from kd.models.cifar_resnet import resnet
from kd.models.mobilenetv2 import mobilenetv2
from kd.models.wrn import wrn
from kd.tasks.classification import Classification

SHAPE = (3, 32, 32)
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def conv(depth: int = 8) -> nn.Module:
    return resnet(depth, (4, 4, 6, 8), num_classes=3, input_shape=SHAPE)


def wider() -> nn.Module:
    return resnet(8, (4, 6, 8, 10), num_classes=3, input_shape=SHAPE)


def vit(classes: int = 3) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes)


def batch(index: bool = True) -> Batch:
    return Batch(torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 0]), torch.arange(4) if index else None)


def prepared(student: nn.Module, teacher: nn.Module, term: Term, index: bool = True, samples: int = 6) -> Distiller:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    made = Distiller(student, Teacher([teacher]), Objective({"term": term}), Classification(), 3, optimizer)
    known = (torch.arange(samples), torch.arange(samples) % 3) if index else (None, None)
    made.prepare(batch(index), *known)
    return made


# ---------------------------------------------------------------------- what must hold

PAIRS = {
    "similarity_preserving": (4, 3, 5, 5),
    "relational_loss": (5, 6),
    "probabilistic_transfer": (5, 6),
    "correlation_congruence": (5, 6),
    "channel_wise_divergence": (2, 3, 4, 4),
    "feature_pearson": (3, 4, 4, 4),
    "gaussian_wasserstein": (2, 3, 4, 4),
    "inter_channel_correlation": (2, 3, 4, 4),
    "neuron_selectivity": (2, 3, 4, 4),
    "reused_classifier": (2, 3, 4, 4),
    "class_attention_transfer": (2, 3, 4, 4),
    "generation_distance": (2, 3, 4, 4),
}


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("correlation_congruence",)])
def test_gradients_by_finite_differences(name: str) -> None:
    function, teacher = getattr(f, name), normal(*PAIRS[name])
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), normal(*PAIRS[name], grad=True))


def test_relations_are_blind_to_what_they_should_be() -> None:
    feature = normal(5, 6)
    rotation = torch.linalg.qr(normal(6, 6)).Q
    assert f.relational_loss(3 * feature @ rotation + 7, feature) < 1e-12  # similar figures
    assert f.probabilistic_transfer(3 * feature @ rotation, feature) < 1e-12
    assert f.similarity_preserving(3 * feature @ rotation, feature) < 1e-12
    assert f.relational_loss(feature + normal(5, 6), feature) > 0.1


def test_angles_in_numpy() -> None:
    feature = normal(4, 3)
    found, points = f.angles(feature).numpy(), feature.numpy()
    for i in range(4):
        for j in (n for n in range(4) if n != i):
            for k in (n for n in range(4) if n != i):
                one, other = points[j] - points[i], points[k] - points[i]
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                np.testing.assert_allclose(found[i, j, k], cosine, rtol=1e-10, atol=1e-12)
    equal = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    f.relational_loss(equal, normal(3, 2)).backward()
    assert equal.grad.abs().max() < 1e6  # samples that have collapsed


@pytest.mark.parametrize(
    ("paper", "code", "factor"),
    [
        (lambda s, t: f.probabilistic_transfer(s, t, "paper"), f.probabilistic_transfer, 25),
        (
            lambda s, t: f.class_attention_transfer(s[:, :, None, None], t[:, :, None, None], variant="paper"),
            lambda s, t: f.class_attention_transfer(s[:, :, None, None], t[:, :, None, None]),
            4,
        ),
    ],
)
def test_variants_that_differ_by_a_factor(paper, code, factor: float) -> None:
    student, teacher = normal(5, 6), normal(5, 6)
    if factor == 4:  # maps of one position: pooled to four equal cells
        assert paper(student, teacher) == pytest.approx(factor * code(student, teacher))
    else:
        torch.testing.assert_close(paper(student, teacher), factor * code(student, teacher))


def test_vid_is_a_gaussian_likelihood() -> None:
    mean, teacher, scale = normal(2, 3, 4, 4), normal(2, 3, 4, 4), normal(3)
    deviation = (F.softplus(scale) + 1e-5).sqrt().view(1, 3, 1, 1).expand_as(mean)
    expected = -torch.distributions.Normal(mean, deviation).log_prob(teacher).flatten(1).sum(1).mean()
    torch.testing.assert_close(f.variational_information(mean, teacher, scale, variant="paper"), expected)


def test_negative_mean_by_sampling() -> None:
    weight, bias = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    draws = bias + weight.abs() * torch.randn(400_000, 2)
    sampled = torch.stack([column[column < 0].mean() for column in draws.T])
    torch.testing.assert_close(f.negative_mean(weight, bias), sampled, rtol=1e-2, atol=0)
    assert f.negative_mean(torch.tensor([1.0]), torch.tensor([9.0])).item() == -3


def test_mgd_masks_positions_or_channels() -> None:
    feature = torch.ones(2, 4, 5, 5)
    seen: list[Tensor] = []
    for mask, dims in (("positions", (1,)), ("channels", (2, 3))):
        generation = Generation(4, 0.5, mask)
        generation.layers.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        generation(feature)
        kept = seen.pop()
        assert (kept.mean(dims) == kept.amax(dims)).all()  # masked as a whole
        assert 0 < kept.mean() < 1


def test_vitkd_hides_tokens_and_shows_the_others() -> None:
    generation, tokens = TokenGeneration(2, 0.7), 1 + torch.rand(2, 16, 2)
    seen: list[Tensor] = []
    generation.layers.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(2).transpose(1, 2)))
    noise = torch.rand(2, 16)
    _, hidden = generation(tokens, noise)
    assert hidden.sum(1).tolist() == [12, 12]  # int(16 · 0.3) are kept
    assert (noise[hidden].view(2, 12).amin(1) > noise[~hidden].view(2, 4).amax(1)).all()
    assert (seen[0][hidden] == 0).all()
    assert torch.equal(seen[0][~hidden], tokens[~hidden])


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 6, 2, 2)], ids=["tall", "wide"])
def test_singular_vectors_and_their_gradient_are_those_of_torch(shape: tuple[int, ...]) -> None:
    """Their sign is anybody's choice: the products of a vector with itself are compared."""
    feature, weight = normal(*shape, grad=True), normal(2, shape[1], shape[1], 2)
    values, vectors = f.singular_vectors(feature, 2)
    _, expected, rows = torch.linalg.svd(feature.flatten(2).transpose(1, 2), full_matrices=False)
    torch.testing.assert_close(values, expected[:, :2].detach())
    ours, theirs = (
        torch.autograd.grad((weight * v[:, :, None] * v[:, None]).sum(), feature)
        for v in (vectors, rows[:, :2].transpose(1, 2))
    )
    torch.testing.assert_close(ours, theirs)


def test_singular_vectors_without_a_direction_have_a_finite_gradient() -> None:
    dead = torch.zeros(2, 3, 2, 2, requires_grad=True)
    equal = torch.eye(4).view(1, 4, 2, 2).requires_grad_()
    for feature in (dead, equal):
        f.singular_vectors(feature, 2)[1].square().sum().backward()
        assert feature.grad.abs().max() < 1


def test_kdsvd_is_blind_to_signs_and_to_what_the_student_has_besides() -> None:
    student, teacher = ([normal(2, 5, 4, 4) for _ in range(2)] for _ in range(2))
    assert f.singular_vector_relations([-t for t in teacher], teacher, 2) < 1e-24
    # a third vector is larger in the student than the one that the teacher has
    vectors = torch.linalg.qr(normal(5, 5)).Q
    left = torch.linalg.qr(normal(16, 16)).Q[:, :5]

    def made(*values: float) -> Tensor:
        return ((left * torch.tensor(values).double()) @ vectors.T).T.reshape(1, 5, 4, 4)

    of_teacher, of_student = made(9, 0.5, 0.4, 0.3, 0.2), made(5, 9, 0.4, 0.3, 0.2)
    assert f.singular_vector_relations([of_student] * 2, [of_teacher] * 2) < 1e-24
    assert f.singular_vector_relations(student, teacher) > 1e-3


def test_the_views_of_scalekd_see_scale_and_mean_not() -> None:
    whole, varying, teacher = (normal(2, 4, 3, 3) for _ in range(3))
    found = f.dual_view_distance(whole, varying, teacher)
    scaled = f.dual_view_distance(2 * whole, 3 * varying + normal(2, 4, 1, 1), teacher)
    torch.testing.assert_close(found, scaled)
    assert f.dual_view_distance(teacher, teacher, teacher) < 1e-24


def test_scalekd_projects_to_any_grid() -> None:
    projector, feature = CrossAttentionProjector((2, 3, 4, 4), (2, 6, 5, 2)).eval(), torch.randn(2, 3, 4, 4)
    found = projector(feature)
    assert found.shape == (2, 6, 5, 2)
    with torch.no_grad():
        projector.queries[3] += 1  # the query of row 1, column 1 changes that position alone
    changed = (projector(feature) != found).any(1).nonzero()[:, 1:].unique(dim=0)
    assert changed.tolist() == [[1, 1]]


def test_directions_alone_are_compared_at_unit_length() -> None:
    student, teacher = normal(4, 3, 2, 2), normal(4, 3, 2, 2)
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1)).mean()
    torch.testing.assert_close(f.hint_loss(3 * student, teacher, "unit"), 2 - 2 * cosine)
    torch.testing.assert_close(f.translated_distance([3 * student], [teacher], 1.0, 0.0), 1 - cosine)


def test_theia_learns_from_several_teachers_without_heads() -> None:
    term = FeatureTranslation([-1, -1], ["0.blocks.1", "1.blocks.0"])
    teachers = Teacher([vit(classes=0), vit(classes=0)])
    made = Distiller(conv(), teachers, Objective({"term": term}), Classification(), 3, partial(torch.optim.SGD, lr=0.1))
    made.prepare(batch(), torch.arange(6), torch.arange(6) % 3)
    teacher, student = made.answer_both(made.task.rows(batch()))
    first, second = (f.translated_distance([s], [t]) for s, t in term.compared(student, teacher))
    torch.testing.assert_close(term(student, teacher, batch()), (first + second) / 2)
    assert first != second
    targets = [t for _, t in term.compared(student, teacher)]
    for target in targets:  # each channel of mean 0 and deviation 1
        torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-5)
        torch.testing.assert_close(target.var((0, 2, 3), correction=0), torch.ones(16), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- banks and queues


def test_crd_keeps_what_the_reference_keeps() -> None:
    with np.load(GOLDEN / "crd.npz") as file:
        given = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}
    temperature, momentum = float(given["temperature"]), float(given["momentum"])
    contrast = Contrast((7, 9), 8, 30, temperature, momentum).double()
    for side in ("student", "teacher"):
        embed = getattr(contrast, f"{side}_embed")
        embed.weight.data, embed.bias.data = (given[f"embed_{side[0]}_{part}"] for part in ("weight", "bias"))
    contrast.student_bank, contrast.teacher_bank = given["memory_v1"], given["memory_v2"]
    loss = contrast(given["student_feature_0"], given["teacher_feature_0"], given["contrast_idx"])
    torch.testing.assert_close(loss.detach(), given["loss"], rtol=1e-7, atol=0)
    torch.testing.assert_close(contrast.student_bank, given["updated_memory_v1"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(contrast.teacher_bank, given["updated_memory_v2"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(contrast.log_z.exp(), torch.stack([given["Z_v1"], given["Z_v2"]]))
    constants = contrast.log_z.clone()
    contrast(given["student_feature_0"] + 1, given["teacher_feature_0"], given["contrast_idx"]).backward()
    assert torch.equal(contrast.log_z, constants)  # of the first batch


def rows_of(targets: Tensor | None, index: Tensor) -> Rows:
    few = Batch(torch.zeros(2, 1), None, index[:2])
    return Rows("crd", Setup(Output(), Output(), few, train_index=index, train_targets=targets), targets)


def test_negatives_are_of_other_classes_and_the_same_everywhere() -> None:
    index = torch.tensor([3, 9, 4, 0, 7, 12])
    targets = torch.tensor([0, 1, 0, UNLABELLED, 1, UNLABELLED])
    rows = rows_of(targets, index)
    assert (len(rows), rows.others) == (6, 4)
    torch.manual_seed(5)
    found = rows.drawn(index, 4000, 0.25)
    torch.manual_seed(6)  # each process has a random state of its own
    assert torch.equal(found, rows.drawn(index, 4000, 0.25))
    assert not torch.equal(found, rows.drawn(index, 4000, 0.26))
    assert found[:, 0].tolist() == list(range(6))
    for row, negatives in enumerate(found[:, 1:]):
        label = targets[row]
        others = [n for n in range(6) if n != row and (label == UNLABELLED or targets[n] != label)]
        counts = torch.bincount(negatives, minlength=6)
        assert counts.nonzero().squeeze(1).tolist() == others
        assert (counts[others] / 4000 - 1 / len(others)).abs().max() < 0.04
    everybody = rows_of(None, index)
    assert everybody.others == 5


def test_a_queue_keeps_the_newest() -> None:
    queue = Queue(3, 1)
    for number in range(1, 6):
        queue(torch.full((1, 1), float(number)))
    assert queue.rows.flatten().tolist() == [5, 4, 3]
    queue.eval()(torch.full((1, 1), 9.0))
    assert queue.rows.flatten().tolist() == [5, 4, 3]
    assert queue(torch.tensor([[6.0], [7.0]])).flatten().tolist() == [6, 7, 5]


@pytest.mark.parametrize("make", [ContrastiveDistillation, QueueSimilarity, RelationalRepresentation])
def test_the_dry_pass_changes_no_bank(make: type[Term]) -> None:
    term = make(**({"negatives": 3} if make is ContrastiveDistillation else {"queue": 6}))
    made = prepared(conv(), wider(), term)
    banks = {n: b.clone() for n, b in term.named_buffers() if "bank" in n or "queue" in n}
    assert banks
    made.losses(made.task.rows(batch()))
    assert all(not torch.equal(dict(term.named_buffers())[n], before) for n, before in banks.items())
    if make is not ContrastiveDistillation:
        assert (banks["queues.0.rows"] == 0).all()


def test_semckd_pairs_every_layer_with_every_other() -> None:
    term = SemanticCalibration([0, 1, 2], [-1, -2], samples=16)
    made = prepared(conv(), wider(), term)
    widths = [(p[0].in_channels, p[-1].out_channels) for p in term.projections]
    assert widths == [(4, 10), (4, 8), (6, 10), (6, 8), (8, 10), (8, 8)]
    assert (len(term.queries), len(term.keys)) == (3, 2)
    made.losses(made.task.rows(batch())).total.backward()
    assert all(p.grad.abs().sum() > 0 for p in [*term.queries.parameters(), *term.projections.parameters()])


def test_the_queries_of_semckd_read_as_many_similarities_as_they_take() -> None:
    embedding, feature = Embedding(4).double(), normal(6, 3)
    padded = torch.cat([feature[:2] @ feature[:2].T, torch.zeros(2, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(embedding(feature[:2]), F.normalize(embedding.layers(padded), dim=1))
    torch.testing.assert_close(embedding(feature), F.normalize(embedding.layers(feature @ feature[:4].T), dim=1))


# ---------------------------------------------------------------------- heads that stay


def test_simkd_deploys_student_projector_and_the_teachers_classifier() -> None:
    student, teacher, data = conv(), wider(), batch()
    term = ReusedClassifier()
    made = prepared(student, teacher, term)
    deployed = made.trained.eval()
    maps: list[Tensor] = []
    student.layer3.register_forward_hook(lambda m, a, output: maps.append(output))
    answer = deployed(data.inputs)
    expected = teacher.fc(term.adapters[0](maps[0]).mean((2, 3)))
    torch.testing.assert_close(answer, expected)
    own = {name for name, p in made.objective.named_parameters() if p.requires_grad}
    assert own
    assert not any("head" in name for name in own)
    assert student.fc.out_features == 3  # the student itself is as it was
    assert not isinstance(student.layer3[-1], type(term.adapters[0]))


def test_simkd_refuses_what_lies_between() -> None:
    net = mobilenetv2(num_classes=3, input_shape=SHAPE)
    with pytest.raises(KdError, match=r"^loss\.term: simkd needs a student with nothing but pooling"):
        prepared(net, wider(), ReusedClassifier())
    prepared(net, wider(), ReusedClassifier(["before_classifier"], ["before_classifier"]))


def test_class_activation_maps_average_to_the_logits() -> None:
    net, data = conv().eval(), batch()
    maps: list[Tensor] = []
    net.layer3.register_forward_hook(lambda m, a, output: maps.append(output))
    logits = net(data.inputs)
    cams = class_activation_maps(maps[0], net.fc.weight, net.fc.bias)
    torch.testing.assert_close(cams.mean((2, 3)), logits)
    student = conv()
    made = prepared(student, wider(), ClassAttentionTransfer())
    made.losses(made.task.rows(data)).total.backward()
    assert student.fc.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in made.objective.terms["term"].head.parameters())


def test_vkd_stays_orthogonal_while_it_is_trained() -> None:
    term = OrthogonalProjection()
    made = prepared(conv(), wider(), term)
    optimizer = torch.optim.SGD(term.parameters(), lr=1.0)
    made.losses(made.task.rows(batch())).total.backward()
    before = term.adapters[0][1].weight.detach().clone()
    optimizer.step()
    weight = term.adapters[0][1].weight
    assert not torch.allclose(weight, before)
    torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0, atol=1e-5)


def test_ft_trains_its_paraphraser_first_and_then_the_student_alone() -> None:
    term = FactorTransfer(epochs=2.0)
    student, teacher = Output(None, {"a": torch.randn(4, 3, 6, 6)}), Output(None, {"b": torch.randn(4, 8, 6, 6)})
    term.student_taps, term.teacher_taps = ["a"], ["b"]
    term.prepare(Setup(student, teacher, batch(), epochs=4))
    assert term.translators[0](student.features["a"]).shape == (4, 4, 6, 6)
    for progress, trained in ((0.49, {"encoders", "decoders"}), (0.5, {"translators"})):
        term.train().zero_grad()
        term.progress = progress
        before = {n: b.clone() for n, b in term.named_buffers() if n.startswith("encoders")}
        term(student, teacher, batch()).backward()
        assert {n.partition(".")[0] for n, p in term.named_parameters() if p.grad is not None} == trained
        moved = any(not torch.equal(dict(term.named_buffers())[n], b) for n, b in before.items())
        assert moved == ("encoders" in trained)  # batch statistics stand still as well
    with pytest.raises(ValueError, match=r"^epochs = 2 is not allowed in a run whose length is in steps: set recipe"):
        FactorTransfer(["a"], ["b"], epochs=2.0).prepare(Setup(student, teacher, batch()))


# ---------------------------------------------------------------------- taps and layouts


def test_taps_before_activations_and_classifiers() -> None:
    wanted = ["all:preactivation", "before_classifier"]
    assert resolve(wanted, conv(14), "student") == [*(f"layer{n}.1.act:input" for n in (1, 2, 3)), "fc:input"]
    assert resolve(["-1:preactivation", "layer1:preactivation"], wrn(16, 1, num_classes=3, input_shape=SHAPE), "s") == [
        "layer3",
        "layer1",
    ]
    resnet18 = timm.create_model("resnet18", num_classes=3)
    assert resolve(["-1:preactivation", "before_classifier"], resnet18, "s") == ["layer4.1.act2:input", "fc:input"]
    headless = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(KdError, match=r"^teacher tap before_classifier does not exist: .*teacher_taps=\[-1\]"):
        resolve(["before_classifier"], headless, "teacher")
    with pytest.raises(KdError, match="does not exist"):
        resolve(["layer9:preactivation"], conv(), "student")


def test_preactivations_are_what_relu_makes_the_stage_of() -> None:
    net = conv(14).eval()
    seen: list[Tensor] = []
    net.layer2[-1].act.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net.layer2.register_forward_hook(lambda m, a, output: seen.append(output))
    net(batch().inputs)
    assert (seen[0] < 0).any()
    assert torch.equal(seen[0].relu(), seen[1])


@pytest.mark.parametrize(
    "term",
    [
        SimilarityPreserving,
        Relational,
        CorrelationCongruence,
        OrthogonalProjection,
        partial(SoftmaxRegression, (-1,), ("before_classifier",)),
        partial(TokenSimilarity, queue=4),
        partial(RelationalRepresentation, queue=4),
        SemanticCalibration,
        FeatureTranslation,
        ScaleDistillation,
        partial(ViTDistillation, (0, -1), (0, -1)),
        ChannelWiseDivergence,
    ],
)
@pytest.mark.parametrize(("student", "teacher"), [(conv, vit), (vit, conv)])
def test_maps_beside_tokens_train(term, student, teacher) -> None:
    made = prepared(student(), teacher(), term())
    total = made.losses(made.task.rows(batch())).total
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.objective.parameters() if p.requires_grad)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "student", "teacher", "index", "sentence"),
    [
        (lambda: ContrastiveDistillation(negatives=5), conv, wider, True, r"negatives = 5 is not .* at most 4$"),
        (
            lambda: ContrastiveDistillation(negatives=3),
            conv,
            wider,
            False,
            "crd keeps a row .* does not tell their index",
        ),
        (lambda: QueueSimilarity(queue=7), conv, wider, True, r"queue = 7 is not allowed: .* at most 6$"),
        (lambda: RelationalRepresentation(queue=7), conv, wider, True, r"queue = 7 is not allowed: rrd .* at most 6$"),
        (
            lambda: SemanticCalibration([-1], ["fc:input"]),
            conv,
            wider,
            True,
            r"semckd cannot compare .*layer3 .*fc:input .*tap maps",
        ),
        (
            lambda: VariationalInformation([-1], ["fc:input"]),
            conv,
            wider,
            True,
            r"vid cannot compare .*layer3 .*fc:input",
        ),
        (lambda: ViTDistillation([-1], [-1]), vit, vit, True, "vitkd mimics the first layers .* two taps or more"),
        *(
            (
                partial(make, [-1], ["fc:input"]),
                conv,
                wider,
                True,
                f"{name} cannot compare .*layer3 .*fc:input .*tap maps",
            )
            for make, name in ((FeatureTranslation, "theia"), (ScaleDistillation, "scalekd"))
        ),
        (lambda: SingularVectorRelations([-1], [-1]), conv, wider, True, "kdsvd compares each layer with the next one"),
        (
            lambda: SingularVectorRelations([0, 1], [0, 1], k=7),
            conv,
            wider,
            True,
            r"k = 7 is not allowed: kdsvd .*layer1 .* at most 6$",
        ),
        (lambda: FlowOfSolution([-1], [-1]), conv, wider, True, "fsp compares each layer with the next one"),
        (lambda: FlowOfSolution(adapter="identity"), conv, wider, True, "adapter = identity needs equal widths"),
        (lambda: ReusedClassifier([-1], [-1]), conv, vit, True, r"simkd cannot compare .*tap maps .* on both sides"),
        (lambda: ClassAttentionTransfer([-2], [-1]), conv, wider, True, "features of width 6 into the student's"),
        (
            lambda: OverhaulDistillation([-1], [-1]),
            conv,
            lambda: wrn(16, 1, num_classes=3, input_shape=SHAPE),
            True,
            "ofd needs the batch norm before teacher tap layer3",
        ),
        (
            lambda: KnowledgeReview([-1], ["blocks.0.attn.qkv"]),
            conv,
            vit,
            True,
            r"reviewkd cannot compare .*blocks\.0\.attn\.qkv",
        ),
    ],
)
def test_refused_before_the_first_batch(make, student, teacher, index: bool, sentence: str) -> None:
    with pytest.raises(KdError, match=rf"^loss\.term: .*{sentence}") as caught:
        prepared(student(), teacher(), make(), index)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ContrastiveDistillation(negatives=0), "negatives = 0"),
        (lambda: ContrastiveDistillation(negatives_from="classes"), "negatives_from = classes"),
        (lambda: CorrelationCongruence(embedding=0), "embedding = 0"),
        (lambda: Relational(w_angle=-1), "w_angle = -1"),
        (lambda: RelationalRepresentation(embedding=0), "embedding = 0"),
        (lambda: SemanticCalibration(samples=0), "samples = 0"),
        (lambda: FeatureTranslation(w_smooth=-1), "w_smooth = -1"),
        (lambda: ViTDistillation(masked=1), "masked = 1"),
        (lambda: SingularVectorRelations(k=0), "k = 0"),
        (lambda: ScaleDistillation(w_varying=-1), "w_varying = -1"),
        (lambda: TokenSimilarity(w_local=-1), "w_local = -1"),
        (lambda: ClassAttentionTransfer(resolution=0), "resolution = 0"),
    ],
)
def test_settings_are_checked(make, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is not allowed: it must be "):
        make()


def test_scalekd_refuses_another_grid() -> None:
    projector = CrossAttentionProjector((2, 8, 4, 4), (2, 6, 3, 3))
    with pytest.raises(ValueError, match=r"scalekd has learned positions for maps of \(8, 4, 4\).*\(8, 6, 6\)"):
        projector(torch.randn(2, 8, 6, 6))
