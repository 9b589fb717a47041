"""The optimizer's state by names of parameters; runs with DeepSpeed are in test_run_resume_ranks.py."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llava_twophase.errors import UserError
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.optimizer_state import load_state, read_state, require_portable

ONE_PROCESS, ZERO2 = Layout(1, 4, 1), Layout(2, 2, 1, zero_stage=2)
RATE = 0.01


def arguments(optim="adamw_torch"):
    return SimpleNamespace(
        optim=optim, world_size=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, deepspeed_plugin=None
    )


class Network(nn.Module):
    """Weights with decay and without, in another order than the optimizer's, frozen ones, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values):
        self.calls += 1
        return self.last(self.norm(self.first(values))) * self.frozen


def make_trainer(seed):
    """The parts of HF Trainer that loading uses, with its two groups of parameters."""
    torch.manual_seed(seed)
    model = Network()
    decayed = ["first.weight", "last.weight"]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": 0.1},
        {"params": [parameters[name] for name in parameters if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        get_decay_parameter_names=lambda _: decayed,
        is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(scaler=None),
    )


def train(trainer, steps):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        trainer.optimizer.zero_grad()
        trainer.model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def save(trainer, folder):
    save_file(trainer.model.state_dict(), folder / "model.safetensors")
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")


def test_load_state_continues_bit_for_bit(tmp_path):
    trained, other = make_trainer(1), make_trainer(2)
    train(trained, 3)
    save(trained, tmp_path)
    load_state(other, tmp_path, ONE_PROCESS)
    assert other.optimizer.param_groups[0]["lr"] == RATE / 4
    for trainer in (trained, other):
        train(trainer, 2)
    for name, weights in trained.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weights)


def test_read_state_gives_each_parameter_its_own_moments(tmp_path):
    trainer = make_trainer(1)
    train(trainer, 3)
    save(trainer, tmp_path)
    order = ["first.weight", "last.weight", "first.bias", "norm.weight", "norm.bias", "last.bias"]
    state = read_state(tmp_path, ONE_PROCESS, order)
    assert state.step == 3
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert state.tensors.keys() == trained.keys()
    for name, parameter in trained.items():
        assert torch.equal(state.tensors[name]["fp32"], parameter)
        assert torch.equal(state.tensors[name]["exp_avg"], trainer.optimizer.state[parameter]["exp_avg"])


def refusal(*checkpoint_and_run):
    """The message of `require_portable`, "" if it accepts."""
    try:
        require_portable(*checkpoint_and_run)
    except UserError as error:
        return str(error)
    return ""


def test_require_portable_accepts_adamw(tmp_path):
    (tmp_path / "scheduler.pt").touch()
    assert refusal(tmp_path, ZERO2, arguments()) == ""
    assert refusal(tmp_path, ZERO2, arguments("adamw_torch_fused")) == ""
    assert refusal(tmp_path, ZERO2, arguments("adafactor")) != ""


def test_require_portable_refuses_other_optimizers_between_engines_only(tmp_path):
    (tmp_path / "scheduler.pt").touch()
    require_portable(tmp_path, Layout(2, 2, 1), arguments("adafactor"))
    with pytest.raises(UserError) as caught:
        require_portable(tmp_path, ZERO2, arguments("adafactor"))
    assert "written by 2 processes" in str(caught.value) and "with ZeRO-2" in str(caught.value)
    assert "the state of --optim adafactor cannot be carried over" in str(caught.value)


def test_require_portable_refuses_a_scheduler_of_deepspeed(tmp_path):
    with pytest.raises(UserError, match='a "scheduler" in the configuration of --deepspeed cannot be carried over'):
        require_portable(tmp_path, ZERO2, arguments())
