"""ViTKD: Yang et al., Practical Guidelines for ViT Feature Distillation, CVPR Workshop 2024, arXiv 2209.02432."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps, width_of
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped, map_to_tokens, tokens_to_map
from kd.losses.logits._divergences import check_factor

__all__ = ["hidden_token_distance", "mimicking_distance"]


def mimicking_distance(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Compute the squared distance of the tokens (B, N, D) of each layer, sum over a sample and the layers, batch mean.

    The student's are of the teacher's width. The code's α is the weight.
    """
    values = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        check_same_shape("features", student, teacher)
        squares = (at_least_float32(student) - at_least_float32(teacher)).square()
        values.append(squares.flatten(1).sum(1).mean())
    return torch.stack(values).sum()


def hidden_token_distance(generated: Tensor, teacher_feature: Tensor, hidden: Tensor, masked: float) -> Tensor:
    """Compute the squared distance of the tokens (B, N, D) that were ``hidden`` (B, N), sum over a sample, batch mean.

    Divided by ``masked``, the share that is hidden.
    """
    check_same_shape("features", generated, teacher_feature)
    squares = (at_least_float32(generated) - at_least_float32(teacher_feature)).square()
    return (squares.sum(2) * hidden.to(squares)).sum(1).mean() / masked


class TokenGeneration(nn.Module):
    """Puts a learned token in the place of a share of the tokens, and makes them anew from the others on the grid.

    3×3 convolution, ReLU, 3×3 convolution.
    """

    def __init__(self, width: int, masked: float) -> None:
        super().__init__()
        self.masked = masked
        self.mask_token = nn.Parameter(torch.zeros(width))
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.layers = nn.Sequential(convs[0], nn.ReLU(), convs[1])

    def forward(self, tokens: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, N, D) → the generated tokens (B, N, D), and which were hidden (B, N).

        ``noise`` (B, N): uniform numbers; of each sample the tokens with the smallest ones are kept.
        """
        noise = torch.rand(tokens.shape[:2], device=tokens.device) if noise is None else noise
        kept = int(tokens.shape[1] * (1 - self.masked))
        hidden = noise.argsort(1).argsort(1) >= kept
        shown = torch.where(hidden.unsqueeze(2), self.mask_token.to(tokens), tokens)
        return map_to_tokens(self.layers(tokens_to_map(shown))), hidden


class ViTDistillation(FeatureTerm):
    """:func:`mimicking_distance` of all taps but the last, and of the last one :func:`hidden_token_distance`.

    The first layers of the student mimic those of the teacher; tokens of its last one are hidden, and made anew. Each
    layer has a linear layer to the teacher's width. Prefix tokens are left out, the student's grid is resampled to the
    teacher's; maps are grids of tokens.

    ``w_generation``: factor of the second part, β / α of the paper; ``masked``: the share of hidden tokens, λ.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (0, 1, -1),
        teacher_taps: Sequence[str | int] | None = (0, 1, -1),
        w_generation: float = 0.1,
        masked: float = 0.5,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if not 0 < masked < 1:
            raise ValueError(f"masked = {masked} is not allowed: it must be above 0 and below 1")
        self.w_generation, self.masked = check_factor("w_generation", w_generation), masked
        self.generation: TokenGeneration | None = None

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make tokens on the teacher's grid, the student's of the teacher's width."""
        _, other = check_maps(self.method, student, teacher)
        linear = nn.Linear(width_of(student), width_of(teacher))
        return nn.Sequential(Convert(student.layout, "tokens", other.grid), linear), Convert(teacher.layout, "tokens")

    def prepare(self, setup: Setup) -> None:
        """Build the linear layers and the generation. ``ValueError`` for a single tap."""
        super().prepare(setup)
        pairs = self.tapped(setup)
        if len(pairs) < 2:
            raise ValueError(
                f"{self.method} mimics the first layers and generates the last one: name two taps or more on each "
                "side, the last layer last"
            )
        like = self.pairs(setup.student, setup.teacher)[-1][0]
        self.generation = TokenGeneration(width_of(pairs[-1][1]), self.masked).to(like)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum of both parts."""
        *low, (own, other) = self.compared(student, teacher)
        assert self.generation is not None
        generated, hidden = self.generation(own)
        with full_precision(own):
            mimicked = mimicking_distance([s for s, _ in low], [t for _, t in low])
            return mimicked + self.w_generation * hidden_token_distance(generated, other, hidden, self.masked)
