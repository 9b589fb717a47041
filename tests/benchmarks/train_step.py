"""Compare the training step with LLaVA's way on the same batch and weights: samples/s, memory, matmul rate.

LLaVA's way is written here from transformers' parts: tower in the step, logits and their float32 copy at every
position, an attention mask, recomputation of every layer. Each row of the table takes one of these away; the last is
`LlavaProjectorModel`. Every row is a process of its own that takes HF Trainer's steps; a row's time is its median step.

    python tests/benchmarks/train_step.py                      # two shapes on a CPU, all five where there is a GPU
    python tests/benchmarks/train_step.py --shapes 1b --ways llava ours --repeats 3
    python tests/benchmarks/train_step.py --paper              # FLOPs and activations alone, in seconds

A way that does not fit, or that fails, says so, and the next one runs. `--shapes 13b` is meant for one H100 and five
minutes; it was not run on one yet.

Weights are random: they change neither times nor memory. Random batches have captions as long as LLaVA-Pretrain's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_twophase.compat import apply_liger  # noqa: E402
from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from llava_twophase.train.data.collator import collate  # noqa: E402
from llava_twophase.train.loop.metrics import StepFlops  # noqa: E402
from llava_twophase.train.model.activation_memory import analytic_estimate  # noqa: E402
from llava_twophase.train.model.frozen_llm import FrozenLLM  # noqa: E402
from llava_twophase.train.model.llava import LlavaProjectorModel  # noqa: E402
from llava_twophase.train.model.load_llm import LoadedLLM  # noqa: E402
from llava_twophase.train.model.projector import build_projector  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATCHES, WIDTH = 576, 1024
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class Shape:
    """An LLM's shape, and its batch size on a CPU; on a GPU it is the recipe's 32."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    tower_layers: int = 24

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.vocabulary > 40_000,
        )


SHAPES = {
    "tiny": Shape("tiny", 64, 128, 2, 4, 2, 512, 2, tower_layers=2),  # to try the script
    "135m": Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, 8),
    "0.5b": Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, 4),
    "1b": Shape("1.1B LLaMA", 2048, 5632, 22, 32, 4, 32000, 4),
    "7b": Shape("Vicuna-7B", 4096, 11008, 32, 32, 32, 32000, 32),
    "13b": Shape("Vicuna-13B", 5120, 13824, 40, 40, 40, 32000, 32),
}


@dataclass(frozen=True)
class Way:
    """The avoidable costs of a step."""

    name: str
    tower: bool = False
    recompute: bool = False
    mask: bool = False
    all_logits: bool = False


WAYS = {
    "llava": Way("LLaVA's way", tower=True, recompute=True, mask=True, all_logits=True),
    "cached": Way("features from a cache", recompute=True, mask=True, all_logits=True),
    "kept": Way("nothing recomputed", mask=True, all_logits=True),
    "unmasked": Way("no attention mask", all_logits=True),
    "captions": Way("logits at captions only"),
    "ours": Way("this project: micro-batches by memory, shorter last layer"),
    "compiled": Way("this project, --torch_compile True"),
    "graphs": Way("this project, compiled with CUDA graphs"),
    "liger": Way("this project, --use_liger_kernel True"),
}
OURS = ("ours", "compiled", "graphs", "liger")
# --torch_compile_mode of the compiled ways.
COMPILED = {"compiled": None, "graphs": "reduce-overhead"}


FIGURES = (
    *("samples_per_second", "peak_gb", "flops_over_matmul", "matmul_tflops", "first_step_seconds"),
    *("seconds_of_steps", "losses"),
)
"""What the last line has of each way; the reason alone, as ``failed``, for a way that did not run."""


class LlavaStep(nn.Module):
    """LLaVA's stage-1 forward pass, without the parts that `way` skips."""

    def __init__(self, llm: Any, projector: nn.Module, tower: nn.Module | None, way: Way) -> None:
        super().__init__()
        self.llm = llm.requires_grad_(False)
        self.mm_projector = projector
        self.tower = tower
        self.way = way
        if way.recompute:
            llm.activation_checkpointing_enable()

    def forward(self, input_ids, labels, features=None, pixels=None, lengths=None):
        if self.tower is not None:
            with torch.no_grad():
                features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        image = self.mm_projector(features)
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))
        embeds = torch.cat([text[:, :1], image, text[:, 2:]], dim=1)  # [B, N, H]
        ignored = labels.new_full((len(labels), image.shape[1]), IGNORE_INDEX)
        labels = torch.cat([labels[:, :1], ignored, labels[:, 2:]], dim=1)  # [B, N]
        mask = None
        if self.way.mask:
            ends = torch.tensor(lengths, device=labels.device)[:, None] - 1 + image.shape[1]
            mask = torch.arange(embeds.shape[1], device=labels.device) < ends
        kept = 0 if self.way.all_logits else input_ids.shape[1] - 1
        logits = self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        labels = labels[:, -logits.shape[1] :]
        loss = nn.functional.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


class Clock(TrainerCallback):
    """Measures the time, loss and gradient norm of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_samples(shape: Shape, folder: Path) -> None:
    """Draw a batch, run the tower over it once, and store it for the processes of all ways."""
    generator = torch.Generator().manual_seed(0)
    batch = shape.batch if DEVICE.type == "cpu" else 32
    # LLaVA-Pretrain's captions have 14 tokens at the median, and a long tail.
    lengths = torch.randn(batch, generator=generator).mul(0.5).exp().mul(14).int().clamp(4, 64).tolist()
    tower = build_tower(shape)
    samples = []
    for length in lengths:
        caption = torch.randint(3, shape.vocabulary, (length,), generator=generator)
        pixels = torch.randn(3, 336, 336, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            hidden = tower(pixels[None].to(DEVICE), output_hidden_states=True).hidden_states[-2]
        samples.append(
            {
                "input_ids": torch.cat([torch.tensor([1, IMAGE_TOKEN_INDEX]), caption]),
                "labels": torch.cat([torch.tensor([IGNORE_INDEX] * 2), caption]),
                "pixels": pixels,
                "features": hidden[0, 1:].cpu(),
            }
        )
    torch.save(samples, folder / "samples.pt")


def build_tower(shape: Shape) -> nn.Module:
    torch.manual_seed(1)
    config = CLIPVisionConfig(**TOWER, num_hidden_layers=shape.tower_layers)
    with DEVICE:
        return CLIPVisionModel._from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def build_model(shape: Shape, key: str) -> nn.Module:
    torch.manual_seed(2)
    with DEVICE:
        llm = LlamaForCausalLM._from_config(shape.config(), dtype=torch.bfloat16)
        projector = build_projector("mlp2x_gelu", WIDTH, shape.hidden).to(torch.bfloat16)
    if key not in OURS:
        return LlavaStep(llm, projector, build_tower(shape) if WAYS[key].tower else None, WAYS[key])
    if key == "liger":
        apply_liger(llm, None)
    model = LlavaProjectorModel(FrozenLLM(LoadedLLM(llm)), projector, image_tokens=PATCHES)
    if key in COMPILED:
        model.frozen.compile(mode=COMPILED[key])
    return model


def matmul_rate(shape: Shape) -> float:
    """Return the FLOP/s of this machine's bf16 matmul at the LLM's own widths: the best of five."""
    rows = 8 * 600 if DEVICE.type == "cuda" else 2 * 600
    left = torch.randn(rows, shape.hidden, device=DEVICE).to(torch.bfloat16)
    right = torch.randn(shape.intermediate, shape.hidden, device=DEVICE).to(torch.bfloat16)
    times = []
    for _ in range(6):
        started = _now()
        for _ in range(4):
            nn.functional.linear(left, right)
        times.append(_now() - started)
    return 4 * 2 * rows * shape.hidden * shape.intermediate / min(times[1:])


def flops(shape: Shape, way: Way, ours: bool, samples: list[dict[str, torch.Tensor]], model: Any) -> float:
    """Count the operations of one step without padding: those that every step needs, and the extra ones of a way."""
    counts = StepFlops.of(model.llm)
    total = 0.0
    for sample in samples:
        positions, kept = len(sample["input_ids"]) - 1 + PATCHES, len(sample["input_ids"]) - 2
        total += counts.count(1, positions, positions if way.all_logits else kept)
        if way.recompute:
            total += 2 * counts.body * positions + 2 * counts.attention * positions**2
        if way.tower:
            total += shape.tower_layers * (2 * 577 * 12 * WIDTH**2 + 4 * 577**2 * WIDTH)
        if ours:  # queries, output projection and MLP of the last layer, at positions whose output is not read
            last = 2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
            total -= 4 * last * (positions - kept)
    return total


def reset_peak_memory() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: reset the process's peak


def peak_memory() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def run_way(shape: Shape, key: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run HF Trainer's steps in one way, in this process."""
    ours, way = key in OURS, WAYS[key]
    unused = "features" if way.tower else "pixels"
    samples = [{k: v for k, v in sample.items() if k != unused} for sample in torch.load(folder / "samples.pt")]
    model, clock = build_model(shape, key), Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / key),
        per_device_train_batch_size=len(samples),
        max_steps=steps + 1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=DEVICE.type == "cpu",
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=samples, callbacks=[clock])
    reset_peak_memory()
    before = matmul_rate(shape)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    peak = peak_memory()
    rate = (before + matmul_rate(shape)) / 2
    seconds = statistics.median(clock.seconds[1:])  # the first step warms up and chooses the micro-batches
    return {
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        "peak_gb": peak / 1e9,
        "flops_over_matmul": flops(shape, way, ours, samples, model) / seconds / rate,
        "matmul_tflops": rate / 1e12,
        "first_step_seconds": clock.seconds[0],
        "seconds_of_steps": [round(seconds, 4) for seconds in clock.seconds[1:]],
        "losses": clock.losses,
        "gradient_norms": clock.norms,
        "micro_batches": str(model.frozen.micro_batching) if ours else "",
    }


def measure(shape_key: str, ways: list[str], repeats: int, steps: int) -> dict[str, dict[str, Any]]:
    """Run every way in its own process, `repeats` times in turns; return the median run of each.

    A way of which no run succeeded has the reason, as ``failed``.
    """
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        draw_samples(SHAPES[shape_key], Path(folder))
        for turn in range(repeats):
            for way in ways:
                print(f"{shape_key}: {way}, run {turn + 1} of {repeats}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--worker", shape_key, way, folder, "--steps", str(steps)]
                done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
                failed = {"failed": f"exit code {done.returncode}; stderr has the reason"}
                runs[way].append(failed if done.returncode else json.loads(done.stdout.splitlines()[-1]))
    return {way: _median(found) for way, found in runs.items()}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    succeeded = sorted((run for run in runs if "failed" not in run), key=lambda run: run["seconds"])
    return succeeded[len(succeeded) // 2] if succeeded else runs[-1]


def show(shape: Shape, results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{shape.name}, bf16, {DEVICE.type}, {torch.get_num_threads()} threads")
    for heading in ("way", "samples/s", "speedup", "peak GB", "of matmul rate", "first losses"):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    first = next(iter(results.values()))
    for key, run in results.items():
        if "failed" in run:
            table.add_row(WAYS[key].name, run["failed"])
            continue
        table.add_row(
            WAYS[key].name,
            f"{run['samples_per_second']:.3f}",
            f"{run['samples_per_second'] / first['samples_per_second']:.2f}" if "failed" not in first else "",
            f"{run['peak_gb']:.2f}",
            f"{run['flops_over_matmul']:.2f}",
            " ".join(f"{loss:.4f}" for loss in run["losses"][:3]),
        )
    Console(width=140).print(table)
    for run in results.values():
        if run.get("micro_batches"):
            print(run["micro_batches"])


def show_paper() -> None:
    """Print counted operations: the speedups of a device that runs all ways at the same share of its rate."""
    table = Table(title="TFLOP a sample, 14 caption tokens, and times of ours")
    for heading in ("way", *(shape.name for shape in SHAPES.values())):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    sample = {"input_ids": torch.zeros(16)}
    with torch.device("meta"):
        models = {
            key: LlavaProjectorModel(FrozenLLM(LoadedLLM(LlamaForCausalLM(shape.config()))), nn.Identity())
            for key, shape in SHAPES.items()
        }
    line: dict[str, Any] = {}
    for key, way in WAYS.items():
        found = [flops(shape, way, key in OURS, [sample], models[name]) for name, shape in SHAPES.items()]
        line[key] = [round(value / 1e12, 3) for value in found]
    for key, values in line.items():
        cells = (f"{value:.2f} {value / ours:.2f}" for value, ours in zip(values, line["ours"], strict=True))
        table.add_row(WAYS[key].name, *cells)
    estimates = [analytic_estimate(shape.config(), PATCHES, element_size=2) for shape in SHAPES.values()]
    table.add_row(
        "activations kept, GB a sample",
        *(f"{memory.needed(samples=1, length=16, checkpoint_every=0) / 1e9:.2f}" for memory in estimates),
    )
    Console(width=140).print(table)
    print(json.dumps(line))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["135m", "0.5b", "1b", "7b", "13b"] if DEVICE.type == "cuda" else ["135m", "1b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default)
    ways = [way for way in WAYS if way not in ("graphs", "liger")]  # these two need a GPU
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=ways, help="the first one is the baseline")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way, in turns; the median is shown")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run, after one warm-up step")
    parser.add_argument("--paper", action="store_true", help="count FLOPs instead of measuring")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape, way, folder = arguments.worker
        print(json.dumps(run_way(SHAPES[shape], way, Path(folder), arguments.steps)))
        return 0
    if arguments.paper:
        show_paper()
        return 0
    line: dict[str, Any] = {}
    for key in arguments.shapes:
        results = measure(key, arguments.ways, arguments.repeats, arguments.steps)
        show(SHAPES[key], results)
        line[f"ways_{key}"] = {
            way: {name: run[name] for name in ("failed", *FIGURES) if name in run} for way, run in results.items()
        }
        baseline, ours = results[arguments.ways[0]], results["ours" if "ours" in results else arguments.ways[-1]]
        if "failed" in baseline or "failed" in ours:
            line[f"speedup_{key}"] = None
            continue
        line[f"speedup_{key}"] = round(ours["samples_per_second"] / baseline["samples_per_second"], 3)
        line[f"flops_over_matmul_{key}"] = round(ours["flops_over_matmul"], 3)
        line[f"peak_gb_{key}"] = {"baseline": round(baseline["peak_gb"], 3), "ours": round(ours["peak_gb"], 3)}
        line[f"losses_{key}"] = {"baseline": baseline["losses"], "ours": ours["losses"]}
        line[f"gradient_norms_{key}"] = {"baseline": baseline["gradient_norms"], "ours": ours["gradient_norms"]}
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
