"""The models that the benchmarks train, and on what.

The batches are small: a core finishes one in a second at most, and the less there is to compute, the larger
the part of communication in a step, and the harder the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

#: Length of a training text of the GPTs.
TOKENS = 64


class DigitsNet(nn.Module):
    """A small convolutional net on 8 x 8 pictures of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.features(pictures)
        return logits


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        mixed: torch.Tensor = x + self.mlp(self.norm2(x))
        return mixed


class GPT(nn.Module):
    """A small GPT on bytes."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x)).transpose(1, 2)  # classes second, as cross_entropy wants them
        return logits


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and what it is trained on.

    Attributes:
        title: for tables.
        build: makes the model.
        dataset: makes all inputs and targets.
        batch_size: of each rank.
        turn_steps: steps of one turn in ``overhead.py``, about a second's work.
        rounds: turns of each system in ``overhead.py``.
    """

    title: str
    build: Callable[[], nn.Module]
    dataset: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    batch_size: int
    turn_steps: int
    rounds: int


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    return torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def _random_text() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(256, (512, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


WORKLOADS = {
    "linear": Workload("linear model", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), _digits, 32, 200, 30),
    "digits": Workload("digits net", DigitsNet, _digits, 32, 60, 30),
    "10m": Workload("GPT 10 M", lambda: GPT(8, 320, 5), _random_text, 2, 5, 14),
    "50m": Workload("GPT 50 M", lambda: GPT(10, 640, 10), _random_text, 2, 3, 7),
}


def parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
