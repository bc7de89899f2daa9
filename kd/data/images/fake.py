"""Made-up images that can be learnt: a smooth pattern for each class, plus noise. For tests and dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kd.config.rules import Rule, list_of, number, refusals, refuse, whole
from kd.data.images.base import DataModule
from kd.data.images.parts import Samples, Source
from kd.data.split import generator

RULES = {
    "shape": Rule("[channels, height, width]", lambda shape: list_of(whole(1)).fits(shape) and len(shape) == 3),
    **dict.fromkeys(("num_classes", "train_images", "test_images"), whole(1)),
    "noise": number(least=0),
}


class Fake(DataModule):
    """``train_images`` + ``test_images`` images of ``shape`` (C, H, W), the same for every seed.

    ``noise``: standard deviation of the noise, in grey levels of 255; the patterns lie about 40 apart.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        train_images: int = 256,
        test_images: int = 128,
        noise: float = 40.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), RULES))
        self.num_classes, self.input_shape = num_classes, (shape[0], shape[1], shape[2])
        self.class_names = [f"class {c}" for c in range(num_classes)]
        self.train_images, self.test_images, self.noise = train_images, test_images, noise

    def load(self) -> Source:
        """Draw the patterns and both parts."""
        random = generator("fake", *self.input_shape)
        coarse = torch.randn(self.num_classes, self.input_shape[0], 4, 4, generator=random).mul_(30)
        patterns = interpolate(coarse, size=self.input_shape[1:], mode="bilinear").add_(128)
        train = self._draw(patterns, self.train_images, random)
        return Source(train, self._draw(patterns, self.test_images, random))

    def _draw(self, patterns: Tensor, count: int, random: torch.Generator) -> Samples:
        targets = torch.arange(count) % self.num_classes
        noise = torch.randn(count, *self.input_shape, generator=random)
        return Samples((patterns[targets] + self.noise * noise).clamp_(0, 255).round_().to(torch.uint8), targets)
