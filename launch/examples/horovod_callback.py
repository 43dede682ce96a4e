"""Handwritten digits with Horovod, made elastic: kill any rank at any time, and add others.

    chaosrun -n 4 launch/examples/horovod_callback.py
    mpirun --with-ft ulfm -n 4 python launch/examples/horovod_callback.py

Needs Horovod: bash launch/install_horovod.sh. What is different from horovod_before.py is marked with (1) to (5).
"""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from train_digits import Net, load_data

import chaos_mpi.horovod


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="per rank, at the start")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    session = chaos_mpi.horovod.init()  # (1) was: hvd.init()
    torch.manual_seed(0)
    train, test_images, test_labels = load_data()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # (2) was: DistributedSampler and torch's DataLoader
    sampler = chaos_mpi.ElasticSampler(train, batch_size=args.batch_size)
    loader = chaos_mpi.DataLoader(train, batch_sampler=sampler)
    # (3) was: broadcast_parameters, broadcast_optimizer_state and DistributedOptimizer
    callback = chaos_mpi.horovod.ChaosCallback(model, optimizer, sampler=sampler, epoch=0)
    optimizer, state = callback.optimizer, callback.state

    for state.epoch in range(state.epoch, args.epochs):  # (4) was: for epoch in range(args.epochs)
        sampler.set_epoch(state.epoch)
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
        # (5) was: hvd.allreduce(accuracy, op=hvd.Average), which does not survive a death; those in the sum are counted
        total, ranks = session.all_reduce(torch.stack([accuracy, torch.ones(())]))
        accuracy = total / ranks
        if hvd.rank() == 0:
            print(f"epoch {state.epoch + 1:3d}  ranks {hvd.size()}  test accuracy {100 * accuracy:.2f} %", flush=True)

    callback.close()


if __name__ == "__main__":
    main()
