"""scikit-learn's handwritten digits: 1,797 images of 8 x 8, inside the wheel."""

from __future__ import annotations

from typing import Any

import torch

from kd.config.rules import refusals, refuse
from kd.data.images.base import DataModule
from kd.data.images.options import SHARE
from kd.data.images.parts import Samples, Source


class Digits(DataModule):
    """``load_digits``, its values 0..16 scaled to 0..255. It has no test set: ``test_fraction`` of it becomes one.

    With the defaults of ``conf/data/digits.yaml`` 808 train, 270 val and 719 test images; ``split_seed`` chooses both
    cuts, and ``index`` is the position among all 1,797.
    """

    def __init__(self, *, test_fraction: float = 0.4, **common: Any) -> None:
        super().__init__(**common)
        refuse(refusals("data.", {"test_fraction": test_fraction}, {"test_fraction": SHARE}))
        self.test_fraction = test_fraction
        self.num_classes, self.input_shape = 10, (1, 8, 8)
        self.class_names = [str(digit) for digit in range(10)]

    def load(self) -> Source:
        """Load all 1,797 images as the training set."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
        return Source(Samples(images[:, None].contiguous(), torch.from_numpy(bunch.target).long()))
