"""The ways that time_to_loss.py compares: which tokens a step uses, the optimizer, and the start.

- pooled tokens first: LLaVolta (arXiv 2406.20092). Patch features are averaged 2 x 2 before the projector.
- a random subset of patches first: FLIP (arXiv 2212.00794), here with the positions that the patches have in the
  complete image.
- Muon: ``torch.optim.Muon`` on the matrices, AdamW on the biases.
- schedule-free AdamW: arXiv 2405.15682.
- a start from ridge regression: the second layer is fitted to the mean embedding of each caption, given the random
  first layer. The mean over patches commutes with the second layer, so this is linear and has a closed form.

Shapes: B samples, L patch tokens, D tower width, H LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from llava_twophase.train.loop.metrics import StepFlops

WARMUP = 0.03
CHUNK = 64


@dataclass(frozen=True)
class Way:
    """What one way changes.

    Attributes:
        label: Name in the table.
        duration: Steps, relative to the baseline's; the schedule always ends with the run.
        own_rate: Learning rate; None: the baseline's.
        optimizer: ``adamw``, ``muon`` or ``schedule_free``.
        tokens: ``all``, ``pooled`` or ``subset``: patch tokens of the first `share` of the steps.
        share: Part of the steps before all tokens are used.
        start: ``random``, or ``ridge``.
    """

    label: str
    duration: float = 1.0
    own_rate: float | None = None
    optimizer: str = "adamw"
    tokens: str = "all"
    share: float = 0.0
    start: str = "random"

    def settings(self) -> dict[str, Any]:
        """Return everything that changes a run."""
        return {name: value for name, value in asdict(self).items() if name != "label"}


WAYS = {
    "baseline": Way("published recipe"),
    "token_schedule": Way("9 pooled tokens for 80 % of steps, then 36", tokens="pooled", share=0.8),
    "patch_subset": Way("9 random patches for 80 % of steps, then 36", tokens="subset", share=0.8),
    "ridge": Way("start from ridge regression, 60 % of steps", duration=0.6, start="ridge"),
    "muon": Way("Muon, 60 % of steps", duration=0.6, optimizer="muon", own_rate=8e-3),
    "schedule_free": Way("schedule-free AdamW, 60 % of steps", duration=0.6, optimizer="schedule_free", own_rate=2e-3),
    "fewer_steps": Way("published recipe, 60 % of steps", duration=0.6),
}


def pool(features: torch.Tensor) -> torch.Tensor:
    """Average 2 x 2 neighbouring patches of a square grid: ``[B, L, D]`` to ``[B, L / 4, D]``, both row by row."""
    samples, tokens, width = features.shape
    half = math.isqrt(tokens) // 2
    return features.view(samples, half, 2, half, 2, width).mean(dim=(2, 4)).reshape(samples, half * half, width)


def random_subset(tokens: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    """Return `kept` of the indices below `tokens`, ascending."""
    return torch.randperm(tokens, generator=generator)[:kept].sort().values


@contextmanager
def patch_positions(llm: Any, image_position: int, patches: torch.Tensor | None, tokens: int) -> Iterator[None]:
    """Give image tokens the positions that `patches` have among all `tokens`, and the text those after all of them.

    The positions reach the rotary embedding alone: gaps in ``position_ids`` would be read as packed sequences.
    """
    if patches is None:
        yield
        return

    def replace(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        text = torch.arange(options["position_ids"].shape[1] - image_position - len(patches))
        image = patches + image_position
        positions = torch.cat([torch.arange(image_position), image, text + image_position + tokens])
        return arguments, {**options, "position_ids": positions[None]}

    handle = llm.model.rotary_emb.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Stepper:
    """Optimizer and schedule of a way. ``evaluating`` gives the weights that an evaluation uses.

    Attributes:
        flops: Operations of the optimizer's matrix products in a step.
    """

    def __init__(self, way: Way, projector: nn.Module, rate: float, steps: int) -> None:
        self._parameters = list(projector.parameters())
        rate = way.own_rate or rate
        warmup = math.ceil(WARMUP * steps)
        self._free: ScheduleFree | None = None
        self.flops = 0.0
        self._optimizers: list[torch.optim.Optimizer] = []
        if way.optimizer == "schedule_free":
            self._free = ScheduleFree(self._parameters, rate, warmup)
        elif way.optimizer == "muon":
            matrices = [parameter for parameter in self._parameters if parameter.ndim == 2]
            biases = [parameter for parameter in self._parameters if parameter.ndim != 2]
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.flops = sum(muon_flops(*parameter.shape) for parameter in matrices)
            self._optimizers = [muon, torch.optim.AdamW(biases, lr=rate, weight_decay=0.0)]
        else:
            self._optimizers = [torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0)]
        self._schedules = [get_cosine_schedule_with_warmup(each, warmup, steps) for each in self._optimizers]

    def step(self) -> None:
        """Update the weights from their gradients, which are clipped at norm 1 as HF Trainer does."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        if self._free is not None:
            self._free.step()
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use the averaged weights of schedule-free AdamW; other optimizers have one set of weights."""
        if self._free is None:
            yield
            return
        self._free.use("x")
        yield
        self._free.use("y")


def muon_flops(rows: int, columns: int) -> float:
    """Return the operations of one update of Muon: five Newton-Schulz iterations of three matrix products."""
    short, long = sorted((rows, columns))
    return 5 * (4 * short**2 * long + 2 * short**3)


class ScheduleFree:
    """Schedule-free AdamW without weight decay (arXiv 2405.15682, algorithm 1): gradients at y, average in x."""

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, parameters: list[nn.Parameter], rate: float, warmup: int) -> None:
        self._parameters = parameters
        self._rate, self._warmup = rate, warmup
        self._steps, self._weight = 0, 0.0
        self._z = [parameter.detach().clone() for parameter in parameters]
        self._x = [parameter.detach().clone() for parameter in parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Take one step; parameters hold y before and after it."""
        momentum, decay = self.BETAS
        self._steps += 1
        rate = self._rate * min(1.0, self._steps / max(self._warmup, 1))
        self._weight += rate**2
        share = rate**2 / self._weight
        for parameter, z, x, squares in zip(self._parameters, self._z, self._x, self._squares, strict=True):
            squares.mul_(decay).addcmul_(parameter.grad, parameter.grad, value=1 - decay)
            scale = (squares / (1 - decay**self._steps)).sqrt_().add_(self.EPSILON)
            z.addcdiv_(parameter.grad, scale, value=-rate)
            x.lerp_(z, share)
        self.use("y")

    @torch.no_grad()
    def use(self, point: str) -> None:
        """Put x, the average, or y, where gradients are taken, into the parameters."""
        for parameter, z, x in zip(self._parameters, self._z, self._x, strict=True):
            parameter.copy_(x if point == "x" else torch.lerp(z, x, self.BETAS[0]))


@torch.no_grad()
def ridge_start(projector: nn.Module, features: torch.Tensor, targets: torch.Tensor) -> float:
    """Fit the second layer of a two-layer projector to the mean caption embeddings.

    Args:
        projector: ``Linear, GELU, Linear``; its second layer is replaced.
        features: ``[N, L, D]`` of the training images.
        targets: float32 ``[N, H]``, the mean embedding of each caption's tokens.

    Returns:
        The penalty, relative to the mean square of a hidden value, that has the least error on every fifth image.
    """
    first, second = projector[0], projector[2]
    chunks = (features[start : start + CHUNK].float() for start in range(0, len(features), CHUNK))
    hidden = torch.cat([nn.functional.gelu(first(chunk)).mean(1) for chunk in chunks]).double()  # [N, H]
    fitted = torch.ones(len(hidden), dtype=torch.bool)
    fitted[::5] = False

    def solve(rows: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = hidden[rows], targets.double()[rows]
        centred = x - x.mean(0)
        gram = centred.T @ centred
        gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T  # [H, H]
        return weight, y.mean(0) - weight @ x.mean(0)

    def error(penalty: float) -> float:
        weight, bias = solve(fitted, penalty)
        return float((hidden[~fitted] @ weight.T + bias - targets[~fitted]).square().mean())

    best = min((10.0**power for power in range(-6, 3)), key=error)
    weight, bias = solve(torch.ones_like(fitted), best)
    second.weight.copy_(weight)
    second.bias.copy_(bias)
    return best


class SampleFlops:
    """Operations of one sample of the lean step, padding excluded.

    Args:
        llm: A LLaMA-like LLM.
        width: D, of the projector's input.
    """

    def __init__(self, llm: Any, width: int) -> None:
        self._llm = StepFlops.of(llm)
        config = llm.config
        # Queries, output projection and MLP of the last layer: needed only where an output is read.
        self._last = 2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        self._first, self._second = width * config.hidden_size, config.hidden_size**2

    def step(self, tokens: int, ids: int, image_position: int) -> float:
        """Return the operations of one sample with `tokens` image tokens and `ids` ids, the image token included."""
        positions, kept = ids - 1 + tokens, ids - image_position - 1
        # The projector's first layer needs no gradient of its input; its weights get theirs.
        projector = tokens * (4 * self._first + 6 * self._second)
        return self._llm.count(1, positions, kept) - 4 * self._last * (positions - kept) + projector

    def ridge(self, images: int, tokens: int) -> float:
        """Return the operations of ``ridge_start``: hidden values of all images, ten solutions."""
        width = self._second**0.5
        return images * tokens * 2 * self._first + 10 * (4 * images * self._second + 3 * width**3)
