"""What cannot be used is refused with a message that says what to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, which MPI needs."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=360, check=False)


@pytest.mark.without_horovod
def test_the_package_loads_without_horovod_and_torch() -> None:
    done = run("import sys, chaos_mpi.horovod; assert not {'torch', 'horovod', 'mpi4py.MPI'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.without_horovod
def test_without_horovod_it_says_what_to_run() -> None:
    done = run("import sys; sys.modules['horovod'] = None; import chaos_mpi.horovod as c; c.init()")
    assert done.returncode != 0
    assert "launch/install_horovod.sh" in done.stderr


@pytest.mark.without_horovod
@pytest.mark.parametrize(
    ("name", "extra"), [("ChaosLightningCallback", "lightning"), ("ChaosTrainerCallback", "transformers")]
)
def test_without_the_trainer_it_says_what_to_install(name: str, extra: str) -> None:
    done = run(f"import sys; sys.modules['{extra}'] = None; import chaos_mpi.horovod as c; c.{name}")
    assert done.returncode != 0
    assert f"ImportError: {name} needs" in done.stderr
    assert f"pip install 'chaos-mpi[{extra}]'" in done.stderr


STEPS = """
import torch, chaos_mpi.horovod as c
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
REFUSED = {
    "a script that starts Horovod itself": ("import horovod.torch as h; h.init(); c.init()", "leave that to"),
    "horovodrun": ("import os; os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR'] = 'x'; c.init()", "chaosrun"),
    "Gloo": ("import os; os.environ['HOROVOD_CONTROLLER'] = 'gloo'; c.init()", "'mpi'"),
    "Adasum": ("import horovod.torch as h; c.ChaosCallback(model, optimizer, op=h.Adasum)", "Adasum"),
    "a wrapped optimizer": ("optimizer.skip_synchronize = None; c.ChaosCallback(model, optimizer)", "the plain one"),
    "parameters that are not in the model": (
        "c.ChaosCallback(model, torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(1))], 0.1))",
        "a parameter that is not in the model",
    ),
    "a second callback": (
        ("m = torch.nn.Linear(1, 1); c.ChaosCallback(model, optimizer)\n"
        "c.ChaosCallback(m, torch.optim.SGD(m.parameters(), 0.1))"),
        "a job can have one ChaosCallback",
    ),
    "parameters that nobody steps": (
        "c.ChaosCallback(torch.nn.Sequential(model, torch.nn.Linear(2, 2)), optimizer)", "leaves out '1.weight'"
    ),
    "sparse gradients": (
        "m = torch.nn.Embedding(3, 3, sparse=True); c.ChaosCallback(m, torch.optim.SGD(m.parameters(), 0.1))", "sparse"
    ),
    "zero_grad between backward and step": (
        "o = c.ChaosCallback(model, optimizer).optimizer; model(torch.ones(1, 2)).sum().backward(); o.zero_grad()",
        "call it after step()",
    ),
    "bfloat16": ("c.ChaosCallback(model.bfloat16(), optimizer)", "'weight' is of torch.bfloat16"),
    "complex numbers": ("c.ChaosCallback(model.to(torch.complex64), optimizer)", "torch.view_as_complex"),
    "a parameter unfrozen later": (
        ("model.bias.requires_grad_(False); o = c.ChaosCallback(model, optimizer).optimizer\n"
        "model(torch.ones(1, 2)).sum().backward(); o.step(); o.zero_grad()\n"
        "model.bias.requires_grad_(True); model(torch.ones(1, 2)).sum().backward(); o.step()"),
        "'bias' has a gradient, and was not trained",
    ),
    "a parameter group added later": (
        ("model.bias.requires_grad_(False); optimizer = torch.optim.SGD([model.weight], lr=0.1)\n"
        "o = c.ChaosCallback(model, optimizer).optimizer; o.add_param_group({'params': model.bias.requires_grad_()})\n"
        "model(torch.ones(1, 2)).sum().backward(); o.synchronize()"),
        "'bias' has a gradient, and was not trained",
    ),
}  # fmt: skip


def test_refused() -> None:
    refuses(STEPS, REFUSED, "horovod.torch", "chaos_mpi.horovod")


def test_bfloat16_is_taken_where_something_else_is_sent() -> None:
    done = run(
        STEPS + "import horovod.torch as h; k = c.ChaosCallback(model.bfloat16(), optimizer, compression="
        "h.Compression.fp16); model(torch.ones(1, 2).bfloat16()).sum().backward(); k.optimizer.step(); k.close()"
    )
    assert done.returncode == 0, done.stderr


LIGHTNING = """
import torch, chaos_mpi.horovod as c
from lightning.pytorch import Callback, LightningModule, Trainer

class Module(LightningModule):
    def __init__(self, optimizers=1, **options):
        super().__init__()
        self.net, self.optimizers_wanted, self.options = torch.nn.Linear(2, 2), optimizers, options
        self.backbone = torch.nn.Identity()
    def training_step(self, batch, batch_idx):
        return self.net(self.backbone(batch)).sum()
    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        made = [torch.optim.SGD(trained, lr=0.1) for _ in range(self.optimizers_wanted)]
        if not self.options:
            return made
        return made, [{"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(made[0]), "monitor": "loss"}]

chaos = c.ChaosLightningCallback()
loader = chaos.loader(torch.ones(8, 2), batch_size=2)
class Accumulate(Callback):
    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = 2
    def on_train_batch_end(self, *_):
        print("a batch was trained on", file=__import__("sys").stderr)

def fit(module, data=loader, more=(), **options):
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **options}
    Trainer(logger=False, enable_checkpointing=False, callbacks=[chaos, *more], **options).fit(module, data)
"""
REFUSED_BY_LIGHTNINGS = {
    "accumulation": ("fit(Module(), accumulate_grad_batches=2)", "accumulate_grad_batches=2): leave it out"),
    "scheduled accumulation": (
        "from lightning.pytorch.callbacks import GradientAccumulationScheduler as G; fit(Module(), more=[G({4: 2})])",
        "GradientAccumulationScheduler: leave it out",
    ),
    "accumulation that another callback begins": ("fit(Module(), more=[Accumulate()])", "leave it at 1"),
    "weights in bfloat16": ("fit(Module(), precision='bf16-true')", "'net.weight' is of torch.bfloat16"),
    "weights thawed later": (
        ("from lightning.pytorch.callbacks import BackboneFinetuning as B\n"
        "m = Module(); m.backbone = torch.nn.Linear(2, 2)\n"
        "fit(m, more=[B(unfreeze_backbone_at_epoch=1, verbose=False)], max_epochs=2)"),
        "'backbone.weight' has a gradient, and was not trained",
    ),
    "a part of an epoch": ("fit(Module(), limit_train_batches=1)", "limit_train_batches=1"),
    "another strategy": ("fit(Module(), strategy='ddp', devices=1)", "strategy='auto'"),
    "another loader": (
        "fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 2)))", "that ChaosLightningCallback.loader() made"
    ),
    "manual optimization": (
        "m = Module(2); m.automatic_optimization = False; fit(m)", "manual optimization: use chaos_mpi.horovod"
    ),
    "ReduceLROnPlateau": ("fit(Module(plateau=True))", "ReduceLROnPlateau"),
    "a search for the learning rate": (
        "from lightning.pytorch.callbacks import LearningRateFinder as F; fit(Module(), more=[F()])",
        "LearningRateFinder, which trains by itself",
    ),
    "a second fit": ("fit(Module()); fit(Module())", "fit() can be called once"),
}  # fmt: skip

TRANSFORMERS = """
import tempfile, torch, chaos_mpi.horovod as c
from transformers import Trainer, TrainingArguments

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
    def forward(self, x):
        return {"loss": self.net(x).sum()}

def train(data=[{"x": torch.ones(2)}] * 8, **options):
    arguments = TrainingArguments(tempfile.mkdtemp(), report_to=[], save_strategy="no", **{"max_steps": 2, **options})
    trainer = Trainer(Module(), arguments, train_dataset=data)
    chaos = c.ChaosTrainerCallback(trainer)
    trainer.train()
    assert chaos.result.steps == 2
    return trainer
"""
REFUSED_BY_TRANSFORMERS = {
    "epochs": ("train(max_steps=-1, num_train_epochs=2)", "set max_steps"),
    "accumulation": ("train(gradient_accumulation_steps=2)", "gradient_accumulation_steps=2): leave it out"),
    "a strategy by epochs": ("train(logging_strategy='epoch')", "logging_strategy='epoch'): use 'steps'"),
    "a stream": (
        "class S(torch.utils.data.IterableDataset):\n    def __iter__(self): return iter([])\ntrain(S())", "no length"
    ),
    "weights in bfloat16": (
        ("Module.__init__ = lambda self: (torch.nn.Module.__init__(self), setattr(self, 'net', "
        "torch.nn.Linear(2, 2).bfloat16()))[0]; train()"),
        "'net.weight' is of torch.bfloat16",
    ),
    "training twice": ("train().train()", "train() can be called once"),
}  # fmt: skip


def refuses(preparation: str, cases: Mapping[str, tuple[str, str]], *packages: str) -> None:
    """Every script is refused in words that contain those beside it."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("forked.py")), *packages],
        input=json.dumps({case: preparation + script for case, (script, _) in cases.items()}),
        capture_output=True, text=True, timeout=360, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.keys() == cases.keys()
    wrong = {
        case: (status, output)
        for case, (status, output) in outcomes.items()
        if status <= 0 or cases[case][1] not in output or "Traceback" in output or "was trained on" in output
    }
    assert not wrong, "\n".join(f"--- {case}: status {status}\n{output}" for case, (status, output) in wrong.items())


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_refused_by_lightnings_callback() -> None:
    refuses(LIGHTNING, REFUSED_BY_LIGHTNINGS, "horovod.torch", "lightning.pytorch", "chaos_mpi.horovod")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_refused_by_the_trainers_callback() -> None:
    refuses(TRANSFORMERS, REFUSED_BY_TRANSFORMERS, "horovod.torch", "transformers", "chaos_mpi.horovod")
