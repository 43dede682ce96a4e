"""Handwritten digits with torch's DistributedDataParallel, as such scripts are written; ddp_chaos.py makes it elastic.

    torchrun --nproc-per-node 4 launch/examples/ddp_before.py

The data (1,797 images of 8 x 8 pixels) come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from train_digits import Net, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    train, test_images, test_labels = load_data()
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=args.batch_size, sampler=sampler)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
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
            print(f"epoch {epoch + 1:3d}, {dist.get_world_size()} ranks: accuracy {accuracy:.2f} %", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
