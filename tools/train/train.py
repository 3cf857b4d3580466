"""The training loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tools.train.model import Llama
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """The settings of one training run."""

    steps: int
    batch_rows: int
    peak_rate: float = 2e-3
    final_share: float = 0.02
    warmup: int = 150
    weight_decay: float = 0.1
    max_minutes: float = 1e9
    seed: int = 7


@dataclass
class Curve:
    """What happened during training."""

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    heldout_steps: list[int] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Writes the curve as JSON and as a picture."""
        (folder / "loss.json").write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4))
        axes.plot(self.steps, self.train, label="training", linewidth=0.8)
        axes.plot(self.heldout_steps, self.heldout, label="held out", marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="loss per token (nats)", title="millrace", yscale="log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / "loss.png", dpi=110)
        pyplot.close(figure)


def targets(batch: Tensor, special: dict[str, int]) -> Tensor:
    """The next token at every position, or ``IGNORED`` where the text is not the model's own.

    What users and operators write is only read, never learned to be written: the loss is
    taken on plain text and on the assistant's turns, their end token included.
    """
    positions = torch.arange(batch.shape[1], device=batch.device)
    marks = torch.tensor(list(special.values()), device=batch.device)
    # The last special token at or before each position says whose text this is.
    last = torch.where(torch.isin(batch, marks), positions, 0).cummax(dim=1).values
    owner = batch.gather(1, last)
    foreign = (owner == special["<|user|>"]) | (owner == special["<|system|>"]) | (owner == special["<|end|>"])
    following = batch[:, 1:]
    return following.masked_fill(foreign[:, :-1], IGNORED)


def fit(
    model: Llama,
    data: np.ndarray,
    heldout: np.ndarray,
    plan: Plan,
    special: dict[str, int],
    device: str,
    console: Console,
) -> Curve:
    """Trains the model in place."""
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), fused=device == "cuda")

    def loss_of(batch: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(batch)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)

    step_loss = torch.compile(loss_of) if device == "cuda" else loss_of

    def to_device(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)

    @torch.no_grad()
    def heldout_loss() -> float:
        model.eval()
        losses = []
        for start in range(0, len(heldout), plan.batch_rows):
            batch = to_device(heldout[start : start + plan.batch_rows])
            losses.append(loss_of(batch[:, :-1], targets(batch, special)).item())
        model.train()
        return float(np.mean(losses))

    curve = Curve()
    done = 0
    order = np.random.default_rng(plan.seed)
    queue = np.empty(0, dtype=np.int64)
    started = time.monotonic()
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    every = max(1, plan.steps // 20)
    running: list[Tensor] = []
    with bar:
        task = bar.add_task("training", total=plan.steps, loss=math.nan)
        for step in range(plan.steps):
            # Progress is the larger of the share of steps and of minutes, so that a run that is
            # cut by the clock still ends with a low learning rate.
            minutes = (time.monotonic() - started) / 60
            progress = max(step / plan.steps, minutes / plan.max_minutes)
            if progress >= 1:
                break
            rate = min(1.0, (step + 1) / plan.warmup) * (
                plan.final_share + (1 - plan.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
            )
            for group in optimiser.param_groups:
                group["lr"] = plan.peak_rate * rate
            if len(queue) < plan.batch_rows:
                queue = np.concatenate([queue, order.permutation(len(data))])
            batch = to_device(data[queue[: plan.batch_rows]])
            queue = queue[plan.batch_rows :]
            loss = step_loss(batch[:, :-1], targets(batch, special))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            done = step + 1
            running.append(loss.detach())
            curve.tokens += batch[:, :-1].numel()
            if len(running) == 10 or step == plan.steps - 1:
                curve.steps.append(step + 1)
                curve.train.append(torch.stack(running).mean().item())
                running.clear()
                bar.update(task, completed=step + 1, loss=curve.train[-1])
            if (step + 1) % every == 0 or step == plan.steps - 1:
                curve.heldout_steps.append(step + 1)
                curve.heldout.append(heldout_loss())
                pace = curve.tokens / (time.monotonic() - started) / 1e6
                console.print(
                    f"step {step + 1}/{plan.steps}  train {curve.train[-1] if curve.train else math.nan:.4f}  "
                    f"held out {curve.heldout[-1]:.4f}  {pace:.2f} M tokens/s"
                )
    curve.seconds = time.monotonic() - started
    if curve.heldout_steps[-1:] != [done]:
        curve.heldout_steps.append(done)
        curve.heldout.append(heldout_loss())
    model.eval()
    return curve
