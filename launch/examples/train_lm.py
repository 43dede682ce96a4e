"""A small GPT on bytes, trained on the source text of Python's own standard library.

    chaosrun -n 4 launch/examples/train_lm.py --params 10M --steps 200

For everything that needs a larger training state: --params takes 1M to 100M. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import chaos_mpi

#: Text beyond this is not read: enough for any demonstration, and quick to load on every rank.
CORPUS_LIMIT_BYTES = 8 << 20


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT on bytes; the output layer shares its weights with the embedding."""

    def __init__(self, layers: int, width: int, block_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.zeros(block_size, width))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Corpus(torch.utils.data.Dataset[torch.Tensor]):
    """Consecutive pieces of ``block_size + 1`` bytes of the standard library's source text."""

    def __init__(self, block_size: int) -> None:
        text = bytearray()
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            text += path.read_bytes()
            if len(text) > CORPUS_LIMIT_BYTES:
                break
        count = (len(text) - 1) // block_size
        self.tokens = torch.frombuffer(text, dtype=torch.uint8)
        self.block_size, self.count = block_size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.block_size
        return self.tokens[start : start + self.block_size + 1].long()


def parameter_count(text: str) -> int:
    """``10M`` or ``2500000``, between 1 M and 100 M."""
    count = int(float(text[:-1]) * 1e6) if text[-1:] in ("M", "m") else int(text)
    if not 1_000_000 <= count <= 100_000_000:
        raise argparse.ArgumentTypeError("choose between 1M and 100M")
    return count


def shape_of(params: int) -> tuple[int, int]:
    """Layers and width of a GPT with about so many parameters: 12 * layers * width^2, at an aspect of about 64."""
    layers = max(2, round((params / (12 * 64**2)) ** (1 / 3)))
    width = 64 * max(1, round(math.sqrt(params / (12 * layers)) / 64))
    return layers, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=parameter_count, default=1_000_000, help="1M to 100M (default 1M)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="per rank, at the start")
    parser.add_argument("--block-size", type=int, default=128, help="bytes of context")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    session = chaos_mpi.init()
    torch.manual_seed(args.seed)
    layers, width = shape_of(args.params)
    net = GPT(layers, width, args.block_size)
    model = chaos_mpi.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    corpus = Corpus(args.block_size)
    sampler = chaos_mpi.ElasticSampler(corpus, batch_size=args.batch_size, seed=args.seed)
    loader = chaos_mpi.DataLoader(corpus, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    if session.rank == 0:
        count = sum(p.numel() for p in net.parameters())
        print(f"{count / 1e6:.1f} M parameters in {layers} layers of width {width}, {len(corpus)} texts", flush=True)

    while session.step < args.steps:
        sampler.set_epoch(state.epoch)
        for tokens in loader:
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            session.record(loss=loss.item())
            if session.rank == 0 and session.step % 10 == 0:
                print(f"step {session.step:5d}  ranks {session.size}  loss {loss.item():.4f}", flush=True)
            if session.step >= args.steps:
                break
        else:
            state.epoch += 1

    result = chaos_mpi.finalize()
    if session.rank == 0:
        same = "bitwise identical" if result.replicas_identical else "DIFFERENT"
        print(f"finished after {result.steps} steps, replicas {same}", flush=True)


if __name__ == "__main__":
    main()
