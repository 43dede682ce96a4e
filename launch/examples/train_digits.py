"""Handwritten digits on a small convolutional net: the main job, in a form to copy from.

    chaosrun -n 4 launch/examples/train_digits.py --epochs 30

The data (1,797 images of 8 x 8 pixels) come with scikit-learn; nothing is downloaded. Kill any rank at any time.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import chaos_mpi


class Net(nn.Sequential):
    """Two convolutions with BatchNorm and a linear layer; about 40,000 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip


def load_data() -> tuple[torch.utils.data.TensorDataset, torch.Tensor, torch.Tensor]:
    """The training set, and images and labels of the test set: every fifth image."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    return torch.utils.data.TensorDataset(images[~is_test], labels[~is_test]), images[is_test], labels[is_test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="per rank, at the start")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    session = chaos_mpi.init()
    torch.manual_seed(args.seed)
    train, test_images, test_labels = load_data()
    model = chaos_mpi.DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    sampler = chaos_mpi.ElasticSampler(train, batch_size=args.batch_size, seed=args.seed)
    loader = chaos_mpi.DataLoader(train, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0)

    def count_correct(indices: range) -> torch.Tensor:
        """Correct answers among these test images; each rank gets its share of them."""
        chosen = list(indices)
        return (model.module(test_images[chosen]).argmax(1) == test_labels[chosen]).sum().reshape(1)

    accuracy = None
    for state.epoch in range(state.epoch, args.epochs):
        sampler.set_epoch(state.epoch)
        model.train()
        loss = None
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            session.record(loss=loss.item())
        if loss is None:  # resumed at the end of this epoch
            continue
        scheduler.step()
        model.eval()
        with torch.no_grad():
            accuracy = float(session.evaluate(len(test_labels), count_correct)[0]) / len(test_labels)
        if session.rank == 0:
            print(
                f"epoch {state.epoch + 1:3d}  step {session.step:5d}  ranks {session.size}  "
                f"loss {loss.item():.4f}  test accuracy {100 * accuracy:.2f} %",
                flush=True,
            )

    result = chaos_mpi.finalize()
    if session.rank == 0:
        same = "bitwise identical" if result.replicas_identical else "DIFFERENT"
        tested = "" if accuracy is None else f"test accuracy {100 * accuracy:.2f} %, "
        print(f"finished after {result.steps} steps: {tested}replicas {same}", flush=True)


if __name__ == "__main__":
    main()
