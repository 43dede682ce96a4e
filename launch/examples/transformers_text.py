"""A small language model with the Hugging Face Trainer on Horovod, elastic: kill any rank at any time, and add others.

    chaosrun -n 4 launch/examples/transformers_text.py
    mpirun --with-ft ulfm -n 4 python launch/examples/transformers_text.py

The model is a GPT-2 with 0.2 M parameters that begin at random, and reads the bytes of Python's own documentation
strings: nothing is downloaded. Needs Horovod (bash launch/install_horovod.sh) and transformers (pip install
'.[transformers]'). What a script for one device has otherwise is marked with (1) and (2).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import chaos_mpi.horovod

LENGTH = 64


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Pieces of a text; each byte is a token."""

    def __init__(self, text: str) -> None:
        self._bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self._bytes[index * LENGTH : (index + 1) * LENGTH].long()
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="per rank, at the start")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    set_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,  # (1) was: num_train_epochs
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.lr,
                warmup_steps=20,
                logging_steps=min(50, args.steps),
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Text("\n".join(pydoc_data.topics.topics.values())),
        )
        chaos = chaos_mpi.horovod.ChaosTrainerCallback(trainer)  # (2) is new
        trainer.train()

    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        last = f"loss {losses[-1]:.2f}" if losses else "no step was left"  # of a job that is resumed at its end
        print(f"{last}, replicas identical: {chaos.result.replicas_identical}", flush=True)


if __name__ == "__main__":
    main()
