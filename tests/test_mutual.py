"""Deep mutual learning: losses and gradients by hand, who steps what, resume, sweep, two processes, the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import Batch, Term
from kd.losses.features.at import AttentionTransfer
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.ctkd import CurriculumTemperature
from kd.losses.logits.kd import KnowledgeDistillation
from kd.models.mlp import mlp
from kd.setups.mutual import Mutual

CLASSES = 4


def net(seed: int, norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, CLASSES))


def batch(count: int = 7) -> Batch:
    random = torch.Generator().manual_seed(3)
    return Batch(torch.randn(count, 5, generator=random), torch.randint(0, CLASSES, (count,), generator=random))


def made(peers: int = 1, terms: dict[str, Term] | None = None, norm: bool = False, **more: Any) -> Mutual:
    given = {"ce": CrossEntropy(), "kd": KnowledgeDistillation(1.0)} if terms is None else terms
    others = {f"peer{number or ''}": net(number + 1, norm) for number in range(peers)}
    return Mutual(net(0, norm), None, Objective(given), num_classes=CLASSES, peers=others, **more)


def by_hand(logits: list[Tensor], targets: Tensor, ensemble: bool) -> list[Tensor]:
    """Eqs. 5 to 8 of the paper: what each network minimises, the others being constants."""
    found = []
    for own in range(len(logits)):
        others = [z.detach().softmax(1) for k, z in enumerate(logits) if k != own]
        others = [torch.stack(others).mean(0)] if ensemble else others
        log_own = logits[own].log_softmax(1)
        kl = sum((p * (p.log() - log_own)).sum(1).mean() for p in others) / len(others)
        found.append(F.nll_loss(log_own, targets) + kl)
    return found


@pytest.mark.parametrize(("peers", "ensemble"), [(1, False), (2, False), (3, False), (3, True)])
def test_losses_and_gradients_are_those_of_the_paper(peers: int, ensemble: bool) -> None:
    module, given = made(peers, ensemble=ensemble), batch()
    module.prepare(given)
    step = module.losses(given)
    networks = [module.student, *module.peers.values()]
    expected = by_hand([network(given.inputs) for network in networks], given.targets, ensemble)
    names = ["loss", *(f"{name}/loss" for name in module.peers)]
    for name, loss in zip(names, expected, strict=True):
        torch.testing.assert_close(step.values[name], loss.detach(), msg=name)
    torch.testing.assert_close(step.total, sum(expected))
    step.total.backward()
    for network, loss in zip(networks, expected, strict=True):
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_each_network_has_an_optimiser_of_its_own() -> None:
    module = made(2)
    assert module.optimizer_names() == ["", "peer", "peer1"]
    steps = [part["optimizer"] for part in module.configure_optimizers()]
    networks = [module.student, *module.peers.values()]
    for optimizer, network in zip(steps, networks, strict=True):
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
    assert Mutual.own_optimizers != module.own_optimizers == ("peer", "peer1")
    assert not module.automatic_optimization
    assert Distiller(net(0), None, Objective({"ce": CrossEntropy()})).automatic_optimization


def test_preparing_leaves_batch_statistics_of_the_peers_as_they_were() -> None:
    module = made(1, norm=True)
    before = {name: tensor.clone() for name, tensor in module.peers.state_dict().items()}
    module.prepare(batch())
    module.find_unreached(batch())
    assert all(torch.equal(tensor, module.peers.state_dict()[name]) for name, tensor in before.items())
    assert module.peers["peer"].training
    assert module.unreached == []


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(KdError, match=r"^distiller = mutual needs a second network: set networks.peer"):
        made(0)
    with pytest.raises(KdError, match=r"^distiller = mutual has no teacher, its networks teach one another"):
        Mutual(net(0), net(1), Objective({"kd": KnowledgeDistillation()}), peers={"peer": net(2)})
    with pytest.raises(KdError, match=r"^loss.at reads intermediate tensors, and distiller = mutual compares logits"):
        made(1, {"at": AttentionTransfer()})
    with pytest.raises(KdError, match=r"^loss.ctkd keeps \S+ over the steps"):
        made(1, {"ce": CrossEntropy(), "ctkd": CurriculumTemperature()}).prepare(batch())
    with pytest.raises(KdError, match=r"^distiller = mutual needs a term that compares two networks"):
        made(1, {"ce": CrossEntropy()})
    with pytest.raises(KdError, match=r"^distiller.ensemble = 1 is not allowed: it must be true or false"):
        made(1, ensemble=1)


# ---------------------------------------------------------------------- runs

RUN = ["distiller=mutual", "loss=[ce,kd]", "loss.kd.temperature=1", "hardware=cpu", "recipe.epochs=3"]
RUN += ["networks.second=${student.model}", "recipe.batch_size=101"]  # 808 training images


def record(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "result.json").read_text())
    return found


@pytest.mark.slow
def test_a_run_names_its_peers_and_goes_on_to_the_same_bits(kd, monkeypatch) -> None:
    said = kd("train", *RUN, "hydra.run.dir=whole")
    assert said.code == 0, said.err
    assert "second, last epoch (3)" in said.out
    whole = record("whole")
    assert whole["overrides"].count("networks.second=${student.model}") == 1
    assert {"peer/ce", "peer/kd", "second/kd"} <= set(whole["student"]["last"]["train"])
    assert set(whole["peers"]) == {"peer", "second"}
    for name, found in whole["peers"].items():
        assert found["epoch"] == 2
        assert found["parameters"] == whole["student"]["parameters"]
        network = mlp([32, 32], num_classes=10, input_shape=(1, 8, 8))
        network.load_state_dict(load_file(f"whole/{name}.safetensors"))
        measure = ["eval", f"student.checkpoint=whole/{name}.safetensors", "model@student=mlp", "out=measured.json"]
        assert kd(*measure, "hardware=cpu").code == 0
        measured = json.loads(Path("measured.json").read_text())["metrics"]
        assert found["test"] == pytest.approx(measured, rel=1e-5)

    begin = Distiller.on_train_epoch_start

    def interrupted(self: Distiller) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        begin(self)

    with monkeypatch.context() as patched:
        patched.setattr(Distiller, "on_train_epoch_start", interrupted)
        assert kd("train", *RUN, "hydra.run.dir=killed").code == 130
    said = kd("train", "resume=killed")
    assert said.code == 0, said.err
    for file in ("student.safetensors", "student_last.safetensors", "peer.safetensors", "second.safetensors"):
        one, other = (load_file(f"{run}/{file}") for run in ("whole", "killed"))
        assert all(torch.equal(one[key], other[key]) for key in {*one, *other}), file
    assert record("killed")["peers"] == whole["peers"]


@pytest.mark.slow
def test_a_sweep_with_a_rate_of_a_peers_own(kd) -> None:
    own = "recipe.networks={second: {optimizer: {_target_: torch.optim.SGD, lr: 0.0}}}"
    said = kd("train", "-m", *RUN, "recipe.epochs=1", own, "seed=0,1", "hydra.sweep.dir=sweep")
    assert said.code == 0, said.err
    runs = [str(file.parent) for file in Path("sweep").glob("*/result.json")]
    assert len(runs) == 2
    for run in runs:
        peers = record(run)["peers"]
        assert peers["peer"]["test"]["acc1"] > peers["second"]["test"]["acc1"]  # which stays as it began


@pytest.mark.slow
def test_two_processes_train_all_networks_like_one(kd) -> None:
    for processes in (1, 2):
        common = [*RUN, "recipe.batch_size=100", "recipe.epochs=1", "data.train_size=250", "hardware=ddp_cpu"]
        said = kd("train", *common, f"hardware.devices={processes}", f"hydra.run.dir={processes}")
        assert said.code == 0, said.err
    one, two = record("1"), record("2")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["student"]["last"]["train"] == pytest.approx(two["student"]["last"]["train"], rel=1e-4)
    for name, found in one["peers"].items():
        assert found["test"] == pytest.approx(two["peers"][name]["test"], abs=1e-4)
        torch.testing.assert_close(*(load_file(f"{n}/{name}.safetensors") for n in "12"), rtol=1e-4, atol=1e-5)
