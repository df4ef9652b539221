"""`ssmzoo eval RUN --lm-eval TASKS`: tasks of EleutherAI's evaluation harness with exact log-likelihoods."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

FLAG = "--lm-eval"


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = kind(prog="ssmzoo eval", description="Evaluate a language model of the zoo with lm-eval.")
    add = made.add_argument
    add("checkpoint", help="run folder, checkpoint, released folder, or name of released weights")
    add(FLAG, required=True, dest="tasks", metavar="TASKS", help="names of tasks, separated by commas")
    add("--include-path", metavar="FOLDER", help="a folder with task files (yaml) of your own")
    add("--num-fewshot", type=int, metavar="N", help="examples before every question (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N questions of every task")
    add("--batch-size", type=int, default=8, metavar="B", help="texts per pass (default 8)")
    add("--max-length", type=int, metavar="L", help="context in tokens (default: no limit)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    add("--out", metavar="FILE", help="write the results as JSON")
    return made


def run(argv: list[str], kind: type[argparse.ArgumentParser]) -> int:
    args = parser(kind).parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install lm_eval datasets")
    if args.limit is not None and args.limit < 1 or args.batch_size < 1:
        raise ValueError(f"--limit {args.limit} and --batch-size {args.batch_size} must be at least 1")
    from ssmzoo.inference.lm_eval import ZooLM, evaluate

    model = ZooLM(args.checkpoint, args.batch_size, args.max_length, device=args.device)
    results = evaluate(
        model, args.tasks.split(","), include_path=args.include_path, num_fewshot=args.num_fewshot, limit=args.limit
    )
    for task, metrics in results["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:<24} {metric:<28} {value:.4f}")
    if args.out:
        Path(args.out).write_text(json.dumps(results["results"], indent=2, default=str), encoding="utf-8")
    return 0
