"""Handwritten digits with torch's DistributedDataParallel, elastic: the differences to ddp_before.py are all it takes.

    chaosrun -n 4 launch/examples/ddp_chaos.py

The data (1,797 images of 8 x 8 pixels) come with scikit-learn; nothing is downloaded. Kill any rank at any time.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from train_digits import Net, load_data

import chaos_mpi.torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    dist.init_process_group("chaos")
    torch.manual_seed(0)
    train, test_images, test_labels = load_data()
    model = DistributedDataParallel(Net())
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = chaos_mpi.ElasticSampler(train, batch_size=args.batch_size)
    loader = chaos_mpi.DataLoader(train, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)

    for state.epoch in range(state.epoch, args.epochs):
        sampler.set_epoch(state.epoch)
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            mine = slice(dist.get_rank(), None, dist.get_world_size())
            correct = model.module(test_images[mine]).argmax(1) == test_labels[mine]
            count = torch.tensor([float(correct.sum()), float(len(correct))])
            dist.all_reduce(count)
        if dist.get_rank() == 0:
            accuracy = 100 * float(count[0] / count[1])
            print(f"epoch {state.epoch + 1:3d}, {dist.get_world_size()} ranks: accuracy {accuracy:.2f} %", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
