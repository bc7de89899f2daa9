"""Taps on any network: outputs, inputs, stages, and every way they can be wrong."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kd.distill.taps import Taps, resolve, unfuse
from kd.errors import KdError
from kd.losses.layouts import Layout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x))


class Net(nn.Module):
    stages = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.pair = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.act(self.pair(x)[0]))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, "text"


def run(taps: Taps, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    taps.active = True
    return net(x)


def test_output_and_input_are_recorded() -> None:
    net, x = Net(), torch.randn(3, 4)
    taps = Taps(net, ["one", "two:input", "two"], "student")
    answer = run(taps, net, x)
    found = taps.take()
    assert torch.equal(found["one"], net.one(x))
    assert torch.equal(found["two:input"], found["one"])
    assert torch.equal(found["two"], answer)


def test_a_tap_that_is_overwritten_in_place_is_cloned() -> None:
    net, x = Net(), torch.randn(3, 4)
    taps = Taps(net, ["one.act:input"], "student")  # the ReLU after it works in place
    run(taps, net, x)
    assert taps.inspect()
    run(taps, net, x)
    assert not taps.inspect()
    assert torch.equal(taps.take()["one.act:input"], net.one.fc(x))


def test_the_gradient_flows_through_a_tap() -> None:
    net, x = Net(), torch.randn(3, 4)
    taps = Taps(net, ["one"], "student")
    run(taps, net, x)
    taps.take()["one"].sum().backward()
    assert net.one.fc.weight.grad is not None
    assert net.two.fc.weight.grad is None


def test_a_tuple_is_represented_by_its_first_tensor() -> None:
    net = Many()
    taps = Taps(net, ["pair"], "teacher")
    run(taps, net, torch.zeros(2))
    assert torch.equal(taps.take()["pair"], torch.ones(2))


class Several(NamedTuple):
    logits: torch.Tensor
    attentions: tuple[torch.Tensor, ...]


class Answering(nn.Module):
    """Answers like the networks of transformers: a tuple with names, or a mapping."""

    def __init__(self, mapping: bool = False) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.mapping = mapping

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        x = self.body(x)
        answer = Several(x, (x + 1, x + 2))
        return OrderedDict(answer._asdict()) if self.mapping else answer


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize(
    ("tap", "value"),
    [
        ("net", 0),
        ("net:output", 0),
        ("net:output.0", 0),
        ("net:output.attentions", 1),
        ("net:output.1.1", 2),
        ("net:output.attentions.1@tokens", 2),
        ("net:input", 0),
        ("net:input.0", 0),
        ("net:input.scale", 5),
    ],
)
def test_one_of_several_tensors(tap: str, value: float, mapping: bool) -> None:
    net = nn.ModuleDict({"net": Answering(mapping)})
    assert resolve([tap], net, "teacher") == [tap]
    taps = Taps(net, [tap], "teacher")
    taps.active = True
    net["net"](torch.zeros(2, 3, 4), scale=torch.full((2, 3, 4), 5.0))
    assert torch.equal(taps.take()[tap], torch.full((2, 3, 4), float(value)))


@pytest.mark.parametrize(
    ("tap", "sentence"),
    [
        (
            "net:output.7",
            r"teacher tap net:output\.7 does not exist: output is a Several with 0, 1, logits",
        ),
        ("net:output.logits.3", r"output\.logits is a Tensor with nothing inside"),
        ("net@NHWC", r"teacher tap net@NHWC has shape \(2, 3, 4\): it is not NHWC, which has 4 dimensions"),
    ],
)
def test_a_tensor_that_is_not_there(tap: str, sentence: str) -> None:
    net = nn.ModuleDict({"net": Answering()})
    taps = Taps(net, [tap], "teacher")
    taps.active = True
    with pytest.raises(KdError, match=sentence):
        net["net"](torch.zeros(2, 3, 4))


def test_a_declared_layout_is_converted() -> None:
    net, x = nn.ModuleDict({"one": nn.Identity()}), torch.randn(2, 3, 4, 5)
    taps = Taps(net, ["one@NHWC", "one"], "student")
    taps.active = True
    net["one"](x)
    assert taps.layouts == {"one@NHWC": Layout("NCHW"), "one": Layout("unknown")}
    found = taps.take()
    assert torch.equal(found["one@NHWC"], x.permute(0, 3, 1, 2))
    assert found["one@NHWC"].data_ptr() == x.data_ptr()
    assert torch.equal(found["one"], x)


def test_a_converted_map_that_is_overwritten_in_place_is_cloned() -> None:
    net, x = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), torch.randn(2, 3, 4, 5)
    taps = Taps(net, ["0@NHWC"], "student")
    run(taps, net, x.clone())
    assert taps.inspect()
    run(taps, net, x.clone())
    assert not taps.inspect()
    assert torch.equal(taps.take()["0@NHWC"], x.permute(0, 3, 1, 2))


def test_an_inactive_tap_keeps_nothing() -> None:
    net = Net()
    taps = Taps(net, ["one"], "student")
    net(torch.randn(3, 4))
    with pytest.raises(KdError, match="student tap one did not fire"):
        taps.take()


def test_a_tap_that_does_not_fire_is_an_error() -> None:
    net = Net()
    taps = Taps(net, ["one.unused"], "student")
    run(taps, net, torch.randn(3, 4))
    with pytest.raises(KdError, match=r"student tap one\.unused did not fire"):
        taps.take()


def test_a_tap_that_fires_twice_is_an_error() -> None:
    net = Many()
    taps = Taps(net, ["act"], "student")
    run(taps, net, torch.zeros(2))
    with pytest.raises(KdError, match="fires 2 times"):
        taps.inspect()


def test_stages_and_integers() -> None:
    assert resolve(None, Net(), "student") == ["one", "two"]
    assert resolve([-1, 0, "one.fc"], Net(), "student") == ["two", "one", "one.fc"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("one.fcc", r"student tap one\.fcc does not exist: there is no module one\.fcc \(near: one\.fc"),
        (5, "student tap 5 does not exist: the stages are one, two"),
        ("one:middle", "after the colon stands input or output"),
        ("one@CHW", "student tap one@CHW: layout = CHW is not allowed: it must be NCHW, NHWC, vector, tokens"),
    ],
)
def test_wrong_names_list_near_ones(name, sentence) -> None:
    with pytest.raises(KdError, match=sentence):
        resolve([name], Net(), "student")


def test_a_network_without_stages_says_so() -> None:
    with pytest.raises(KdError, match="teacher: "):
        resolve(None, nn.Sequential(nn.Linear(2, 2)), "teacher")


@pytest.mark.parametrize("tap", ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop:input"])
def test_fused_attention_is_named_with_a_cure_that_works(tap) -> None:
    """The cure is timm's own switch, in the environment: it is read where timm is imported."""
    import timm
    from timm.layers import set_fused_attn

    def attention(fused: bool) -> torch.Tensor:
        set_fused_attn(fused)  # what TIMM_FUSED_ATTN=0 does
        try:
            net = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
        finally:
            set_fused_attn(True)
        taps = Taps(net, [tap], "teacher")
        run(taps, net, torch.randn(2, 3, 32, 32))
        return taps.take()[tap]

    with pytest.raises(KdError, match=rf"teacher tap {tap} did not fire: blocks\.\d\.attn .*TIMM_FUSED_ATTN=0"):
        attention(fused=True)
    maps = attention(fused=False)
    assert maps.shape[0] == 2
    assert torch.allclose(maps.sum(-1), torch.ones(()))


# ---------------------------------------------------------------------- networks of transformers

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
IDS = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]])}


def transformer(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=12, vocab_size=20)
        return transformers.DistilBertModel(config).eval()
    if kind == "gpt2":
        special = {"bos_token_id": 1, "eos_token_id": 1}
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8, **special)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if kind == "bart":
        sizes = {"d_model": 8, "vocab_size": 20, "encoder_layers": 2, "decoder_layers": 3}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        return transformers.BartModel(transformers.BartConfig(**sizes, decoder_ffn_dim=12, **special)).eval()
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama", "gpt2", "bart"])
@torch.no_grad()
def test_integers_number_the_hidden_states(kind: str) -> None:
    net = transformer(kind)
    names = resolve(None, net, "student")
    assert resolve([0, 1, -1], net, "student") == [names[0], names[1], names[2]]
    taps = Taps(net, names, "student")
    taps.active = True
    answer = net(**IDS, output_hidden_states=True)
    found = taps.take()
    expected = answer.encoder_hidden_states if kind == "bart" else answer.hidden_states
    last = -1 if kind in ("llama", "gpt2") else None  # transformers puts the final norm behind its last one
    for name, hidden in list(zip(names, expected, strict=True))[:last]:
        torch.testing.assert_close(found[name], hidden)
    assert {str(layout) for layout in taps.layouts.values()} == {"tokens, no prefix tokens"}


@pytest.mark.parametrize(
    ("kind", "tap", "expected"),
    [
        ("bert", "-1:query", ["bert.encoder.layer.1.attention.self.query"]),
        ("bert", "1:key", ["bert.encoder.layer.0.attention.self.key"]),
        ("bert", "bert.encoder.layer.1:value", ["bert.encoder.layer.1.attention.self.value"]),
        ("bert", "all:query", [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]),
        ("distilbert", "all:key", [f"transformer.layer.{i}.attention.k_lin" for i in range(2)]),
        ("llama", "-2:value", ["model.layers.0.self_attn.v_proj"]),
        ("bart", "decoder.layers.2:query", ["decoder.layers.2.self_attn.q_proj"]),
    ],
)
def test_queries_keys_and_values_of_layers(kind: str, tap: str, expected: list[str]) -> None:
    assert resolve([tap], transformer(kind), "teacher") == expected


@pytest.mark.parametrize(
    ("kind", "tap", "sentence"),
    [
        (
            "bert",
            "0:query",
            r"teacher tap 0:query does not exist: in bert\.encoder\.layer\.0:input there is no such module",
        ),
        ("bert", "3:key", "teacher tap 3 does not exist: the stages are"),
        (
            "bert",
            "-3:key",
            r"in bert.*\.1 there is no such module named key, k_lin, k_proj, k: name the one that makes",
        ),
        ("bert", "encoder:value", "there is no module encoder"),
        ("gpt2", "all:query", "named query, q_lin, q_proj, q: name the one that makes the query yourself"),
    ],
)
def test_projections_that_are_not_there(kind: str, tap: str, sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        resolve([tap], transformer(kind), "teacher")


@pytest.mark.parametrize(
    ("kind", "tap", "model"),
    [
        ("bert", "bert.encoder.layer.1.attention.self:output.1", "bert"),
        ("distilbert", "transformer.layer.0.attention:output.1", "DistilBertModel"),
        ("llama", "model.layers.0.self_attn:output.1", "model"),
    ],
)
@torch.no_grad()
def test_attention_maps_of_transformers(kind: str, tap: str, model: str) -> None:
    net = transformer(kind)
    taps = Taps(net, [tap], "teacher")
    taps.active = True
    with pytest.raises(
        KdError, match=rf"^teacher tap {tap} is None: fused attention makes no maps; a term that declares"
    ):
        net(**IDS)
    fused = Taps(net, resolve([-1], net, "teacher"), "teacher")
    fused.active, taps.active = True, False
    net(**IDS)
    before = next(iter(fused.take().values()))
    assert unfuse(net, [tap]) == [model]
    assert unfuse(net, [tap]) == []
    taps.active = True
    net(**IDS)
    maps = taps.take()[tap]
    assert maps.shape == (2, 2, 4, 4)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4))
    assert (maps[1, :, :2, 2:] == 0).all()
    after = next(iter(fused.take().values()))
    torch.testing.assert_close(after[IDS["attention_mask"].bool()], before[IDS["attention_mask"].bool()])
