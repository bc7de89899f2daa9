"""The bar on a terminal says what the lines say: epochs from 1, the loss; and how long the run will take."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.losses.logits.ce import CrossEntropy
from kd.run.callbacks import RunBar


class Seen(L.Callback):
    """Notes description and metrics of the bar behind each step."""

    def __init__(self, bar: RunBar) -> None:
        self.bar, self.seen = bar, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append((self.bar.train_progress_bar.description, self.bar.get_metrics(trainer, module)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*is deprecated.*")
def test_it_counts_epochs_from_one_and_shows_loss_and_time_left() -> None:
    bar = RunBar(refresh_rate=50)
    seen = Seen(bar)
    module = Distiller(nn.Linear(4, 2), None, Objective({"ce": CrossEntropy()}), log_every=1)
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[bar, seen], **quiet).fit(module, loader, loader)
    assert [description for description, _ in seen.seen] == ["epoch 1/2"] * 2 + ["epoch 2/2"] * 2
    assert all(float(metrics["loss"]) > 0 and "v_num" not in metrics for _, metrics in seen.seen)
    assert re.fullmatch(r"\d+:\d\d:\d\d", seen.seen[-1][1]["left"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*is deprecated.*")
def test_its_numbers_are_made_when_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Counted(RunBar):
        def get_metrics(self, trainer, module):
            drawn.append(trainer.fit_loop.epoch_loop.batch_idx + 1)
            return super().get_metrics(trainer, module)

    module = Distiller(nn.Linear(4, 2), None, Objective({"ce": CrossEntropy()}))
    loader = DataLoader(TensorDataset(torch.randn(28, 4), torch.arange(28) % 2), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Counted(refresh_rate=3)], **quiet).fit(module, loader, loader)
    drawn = drawn[drawn.index(3) :]  # without the check of the validation
    assert drawn[:3] == [3, 6, 7]
    assert drawn.count(4) == drawn.count(5) == 0
