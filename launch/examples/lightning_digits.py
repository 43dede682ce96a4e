"""Handwritten digits with PyTorch Lightning on Horovod, elastic: kill any rank at any time, and add others.

    chaosrun -n 4 launch/examples/lightning_digits.py
    mpirun --with-ft ulfm -n 4 python launch/examples/lightning_digits.py

Needs Horovod (bash launch/install_horovod.sh) and Lightning (pip install '.[lightning,demo]'). What a script
for one device has otherwise is marked with (1) to (3).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from train_digits import Net, load_data

import chaos_mpi.horovod


class Digits(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = Net()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="per rank, at the start")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    chaos = chaos_mpi.horovod.ChaosLightningCallback()  # (1) is new
    torch.manual_seed(0)
    train, test_images, test_labels = load_data()
    loader = chaos.loader(train, batch_size=args.batch_size)  # (2) was: DataLoader(train, ..., shuffle=True)
    validation = DataLoader(TensorDataset(test_images, test_labels), batch_size=256)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=args.epochs, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[chaos],
    )  # fmt: skip  # (3): callbacks=[chaos]
    trainer.fit(Digits(args.lr), loader, validation)

    if trainer.is_global_zero:
        accuracy, same = trainer.callback_metrics["accuracy"].item(), chaos.result.replicas_identical
        print(f"test accuracy {100 * accuracy:.2f} %, replicas identical: {same}", flush=True)


if __name__ == "__main__":
    main()
