"""Handwritten digits with a script as there are many for Elastic Horovod; only the import is another one.

    chaosrun -n 4 launch/examples/train_horovod.py

Kill any rank at any time; ask for more ranks with ``chaosctl add``. The script runs with Horovod as well, if the line
``import chaos_mpi.horovod.torch as hvd`` is ``import horovod.torch as hvd``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import chaos_mpi.horovod.torch as hvd

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=16, help="per rank")
parser.add_argument("--batches-per-commit", type=int, default=5)
args = parser.parse_args()

hvd.init()
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
is_test = torch.arange(len(labels)) % 5 == 0
train_set = torch.utils.data.TensorDataset(images[~is_test], labels[~is_test])
sampler = hvd.elastic.ElasticSampler(train_set)
loader = torch.utils.data.DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    """All epochs; entered again when ranks have come or gone."""
    while state.epoch < args.epochs:
        model.train()
        for batch, (inputs, targets) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            sampler.record_batch(batch, args.batch_size)
            if batch % args.batches_per_commit == 0:
                state.commit()
        model.eval()
        with torch.no_grad():
            correct = (model(images[is_test]).argmax(1) == labels[is_test]).float().mean()
        accuracy = hvd.allreduce(correct, name="accuracy").item()
        if hvd.rank() == 0:
            print(f"epoch {state.epoch + 1:2d}  ranks {hvd.size()}  test accuracy {100 * accuracy:.2f} %", flush=True)
        state.epoch += 1
        sampler.set_epoch(state.epoch)
        state.commit()


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0))
