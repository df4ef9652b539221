"""The shared loop: configuration -> objects -> fit -> report, in a run folder.

<runs_dir>/<model>/<name>/config.yaml  metrics.csv  curves.png  report.md  checkpoints/  status.txt  (bad_batch.pt)
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ssmzoo.adapt.lora import merged
from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
from ssmzoo.layers.feedforward.moe import active_parameters
from ssmzoo.presets import build_model
from ssmzoo.tasks.micro_batch import is_out_of_memory
from ssmzoo.threads import sharing
from ssmzoo.train import changes, ledger, optim
from ssmzoo.train.build import Loop, Objects, build, build_loop
from ssmzoo.train.callbacks import interruptible, stop
from ssmzoo.train.checkpoint import last_good_checkpoint, write_text
from ssmzoo.train.errors import RESUME_ME, TrainingFailed, UserError, user_errors
from ssmzoo.train.evaluate import evaluate, evaluate_task
from ssmzoo.train.freed_memory import keep_freed_memory
from ssmzoo.train.manifest import threads_note
from ssmzoo.train.progress import clock
from ssmzoo.train.quiet import quiet
from ssmzoo.train.recomputation_cost import describe
from ssmzoo.train.report import backends_line, draw_curves, show, typed, write_interrupted, write_report
from ssmzoo.train.tracking import ending_wandb

__all__ = ["evaluate", "train"]


def train(cfg: DictConfig) -> float:
    """Run what `cfg` says; returns the best value of the task's monitored metric (for sweepers)."""
    quiet()
    keep_freed_memory()
    unattended = cfg.resume == "auto"
    run = ledger.choose_run(cfg)
    if run.resuming and unattended and ledger.read_status(run.folder)[0] == "finished":
        print(f"{run.folder} is finished")
        return ledger.best_value(run.folder)
    with ExitStack() as until_end:
        if run.resuming:
            until_end.enter_context(ledger.claimed(run))
        objects = build(run.cfg, run.resuming)
        folder = run.folder if run.resuming else until_end.enter_context(ledger.claimed(run))
        until_end.enter_context(interruptible(folder))
        until_end.enter_context(ending_wandb())
        checkpoint = find_start(folder, objects) if run.resuming else None
        loop = make_loop(objects, folder, checkpoint, run.resuming)
        begin(objects, folder)
        if run.changes and ledger.rank() == 0:
            changes.note(folder, read_manifest(checkpoint)["step"] if checkpoint else 0, run.changes)
        value = fit_and_report(objects, loop, folder, checkpoint)
    os.environ.pop(ledger.RUN_DIR, None)
    return value


@user_errors
def find_start(folder: Path, objects: Objects) -> Path | None:
    """The checkpoint to continue from, which must fit; None: there is none yet."""
    checkpoint = last_good_checkpoint(folder)
    if checkpoint is None:
        print(f"{folder} has no checkpoint yet: starting at step 0", flush=True)
        return None
    found = {k: tuple(v.shape) for k, v in read_weights(checkpoint).items()}
    state = {k.replace("_orig_mod.", ""): v for k, v in objects.task.model.state_dict().items()}
    own = {k: tuple(v.shape) for k, v in merged(state).items()}
    if found != own:
        wrong = sorted(k for k in found.keys() | own.keys() if found.get(k) != own.get(k))
        raise UserError(f"the weights of {checkpoint} are not those of its run's model: {wrong[0]} differs")
    note = threads_note(read_manifest(checkpoint))
    if note and ledger.rank() == 0:
        print(note, flush=True)
    return checkpoint


def make_loop(objects: Objects, folder: Path, checkpoint: Path | None, resuming: bool) -> Loop:
    """The Trainer; what was logged after the checkpoint is forgotten (wandb only appends: there it appears twice)."""
    manifest = read_manifest(checkpoint) if checkpoint is not None else {}
    step = manifest.get("step", 0)
    before = manifest.get("config", {}).get("optim")
    new_optim = checkpoint is not None and before != objects.plain["optim"]
    loop = build_loop(objects, folder, step if resuming else None, new_optim)
    if resuming:
        loop.trainer.loggers[0].continue_after(step, checkpoint is not None and "first_row" not in manifest)
    return loop


def begin(objects: Objects, folder: Path) -> None:
    """Nothing was written until here: from now on there is a run."""
    if ledger.rank() > 0:
        return
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(objects.plain)))
    os.environ[ledger.RUN_DIR] = str(folder)  # processes that Lightning starts from here belong to the same run
    roles = optim.roles_table(objects.task.model, objects.plain["optim"].get("decay", "roles"))
    rate = f"learning rate {objects.plain['optim'].get('lr', 1e-3):g} at its peak"
    print(f"{objects.model_name} in {folder}\n{roles}\n{rate}\n{backends_line()}", flush=True)
    for said in (describe(objects.task.model, objects.plain, objects.data), sharing(torch.get_num_threads())):
        if said:
            print(said, flush=True)
    ledger.write_status(folder, "running")


def fit_and_report(objects: Objects, loop: Loop, folder: Path, checkpoint: Path | None) -> float:
    trainer, started = loop.trainer, time.monotonic()
    fit(objects, loop, folder, checkpoint)
    if loop.signals.received:
        stop(folder, f"stopped by {loop.signals.received} at step {trainer.global_step}")
    if loop.checkpointer.failures:
        stop(folder, f"trained to step {trainer.global_step}, but its checkpoint could not be written; make room")
    if trainer.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        sys.exit(0)
    try:
        value = report(objects, loop, folder, time.monotonic() - started)
    except OSError as error:
        stop(folder, f"trained to the end, but the report could not be written ({error})")
    ledger.write_status(folder, "finished")
    return value


def fit(objects: Objects, loop: Loop, folder: Path, checkpoint: Path | None) -> None:
    """Lightning's fit; leaves the run's status, curves and a message behind however it ends."""
    trainer = loop.trainer
    try:
        trainer.fit(objects.task, datamodule=objects.data, ckpt_path=checkpoint, weights_only=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if getattr(end, "code", None) == RESUME_ME:  # a signal before the first step, which has been reported
            raise
        stop(folder, f"stopped at once at step {trainer.global_step}")  # a second signal
    except Exception as error:
        if is_out_of_memory(error):
            error = TrainingFailed(
                f"out of memory at step {trainer.global_step}: lower data.batch_size (and raise "
                f"trainer.accumulate_grad_batches by as much), set grad_checkpointing=true, or let "
                f"callbacks.guards.halve_batch=true do the former when it is needed. {str(error).splitlines()[0]}"
            )
        why = " ".join(str(error).split())[:500]
        ledger.write_status(folder, "failed", why)
        write_interrupted(folder, f"failed: {why}")
        raise error


def report(objects: Objects, loop: Loop, folder: Path, seconds: float) -> float:
    """Evaluate the best weights, print and write the report; returns the monitored value."""
    trainer, task, plain = loop.trainer, objects.task, objects.plain
    rate = loop.progress.throughput(trainer, task)
    best = find_checkpoint(folder)
    task.model = build_model(plain["model"])  # the trained one may be in shards
    task.model.load_state_dict(read_weights(best))
    validation = evaluate_task(task, objects.data, plain["trainer"])
    found = task.report(folder, validation)
    total, active = count_parameters(task.model)
    rows = found.rows | {
        "weights reported": f"step {read_manifest(best)['step']:,}, best val/{task.monitor}",
        "parameters": f"{total:,}" + (f" ({active:,} active per token)" if active != total else ""),
        f"{task.unit} seen": f"{task.seen * trainer.world_size:,}",
        f"{task.unit}/s in training": f"{rate:,.0f}",
        "learning rate": f"{plain['optim'].get('lr', 1e-3):g} at its peak",
        "steps": f"{trainer.global_step:,}",
        "time": clock(seconds),
    }
    if history := changes.history(folder):
        rows["changed when resumed"] = history
    title = f"{objects.model_name}, seed {plain['seed']}"
    curves = draw_curves(folder / "metrics.csv", folder / "curves.png", task.monitor, title)
    figures = ([curves] if curves else []) + found.figures
    write_report(folder, f"{objects.model_name}: {folder.name}", typed(), rows, found.texts, figures)
    print()
    show(rows, found.texts)
    print(f"\nrun folder: {folder}")
    return validation.get(task.monitor, float("nan"))


def count_parameters(model) -> tuple[int, int]:
    """(all, active per token): the two differ for mixtures of experts and memories."""
    return sum(p.numel() for p in model.parameters()), active_parameters(model)
