"""Makes the bundled model: ``python -m tools.train --out src/penstock/bundled/millrace``."""

from __future__ import annotations

import argparse
import random
import time
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from tools.train import corpus, evaluate, model, tokenizer, train


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, default=Path("build/millrace"), help="folder for the loss curve, samples and evaluation"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, default=5200, help="optimiser steps of 256 rows of 1024 tokens")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=1e9,
        help="end the training after this time, with the learning rate brought down in time",
    )
    parser.add_argument("--shards", type=int, default=240, help="corpus shards of 4000 documents")
    parser.add_argument("--workers", type=int, default=0, help="processes that write the corpus (0: one per core)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--smoke", action="store_true", help="the whole pipeline on a toy scale, in under a minute on two cores"
    )
    return parser.parse_args()


def main() -> None:
    """Corpus, tokenizer, training, evaluation, publication."""
    args = arguments()
    console = Console(soft_wrap=True)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    if args.smoke:
        config = model.Config(
            vocab_size=1024, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=1024
        )
        plan = train.Plan(steps=min(args.steps, 40), batch_rows=4, warmup=5, seed=args.seed)
        shards, per_shard, sample, length = 2, 300, 600, 257
    else:
        config = model.Config()
        plan = train.Plan(
            steps=args.steps, batch_rows=256 if device == "cuda" else 32, max_minutes=args.max_minutes, seed=args.seed
        )
        shards, per_shard, sample, length = args.shards, 4000, 20000, config.max_positions + 1

    console.print("[bold]tokenizer")
    # The sample comes from a split of its own; more shards keep it as mixed as the corpus.
    texts = chain.from_iterable(corpus.documents(args.seed, "tokenizer", shard, sample // 10) for shard in range(10))
    bpe = tokenizer.train(texts, config.vocab_size)
    tokenizer.save(bpe, args.out, config.max_positions)
    special = {token: bpe.token_to_id(token) for token in tokenizer.SPECIAL}

    console.print(f"[bold]corpus[/] ({time.monotonic() - started:.0f} s)")
    path = str(args.out / "tokenizer.json")
    data = corpus.build(path, args.seed, "train", shards, per_shard, length, args.workers)
    heldout = corpus.build(path, args.seed, "heldout", 1, 300 if args.smoke else 4000, length, 1)
    console.print(f"{data.size / 1e6:.1f} M tokens in {len(data)} rows, {heldout.size / 1e6:.2f} M held out")

    network = model.Llama(config)
    console.print(
        f"[bold]training[/] {network.parameter_count / 1e6:.2f} M parameters on {device} "
        f"({time.monotonic() - started:.0f} s)"
    )
    curve = train.fit(network, data, heldout, plan, special, device, console)
    curve.save(args.work)
    model.save(network, args.out, special)
    console.print(f"trained on {curve.tokens / 1e6:.0f} M tokens in {curve.seconds:.0f} s")

    console.print(f"[bold]evaluation[/] ({time.monotonic() - started:.0f} s)")
    # What is judged is the published file, float16 and all.
    published = model.load(args.out, device)
    tail = curve.train[-20:]
    report = evaluate.evaluate(
        published, bpe, curve.heldout[-1], sum(tail) / len(tail), args.work, console, quick=args.smoke
    )
    failed = [name for name, passed in report["checks"].items() if not passed]
    console.print(f"done in {time.monotonic() - started:.0f} s; checks failed: {', '.join(failed) or 'none'}")
    if failed and not args.smoke:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
