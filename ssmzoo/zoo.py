"""Models by name, with weights: fresh ones, or those of a run folder or checkpoint of ours."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ssmzoo.checkpoint_files import MANIFEST, find_checkpoint, read_manifest, read_weights, weights_of
from ssmzoo.presets import (  # noqa: F401
    build_model,
    build_preset,
    config_dir,
    config_names,
    describe_config,
    list_models,
    model_class,
    read_model_config,
)
from ssmzoo.released.family import to_ours
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.fit import fit_state_dict


def create_model(name: str, *, checkpoint: str | None = None, **overrides) -> nn.Module:
    """Build a model of the zoo by name.

    name        one of `list_models()`
    checkpoint  a run folder or checkpoint of ours, or a released file in official names, whose weights are loaded; its
                architecture must be the one asked for
    overrides   constructor arguments that replace the preset's

    Sizes that a data set decides when training (vocab_size, num_classes) take the constructor's default unless given.
    Raises ValueError for an unknown name, TypeError for an unknown argument.
    """
    model = build_preset(name, **overrides)
    if checkpoint is not None:
        fit_state_dict(model, to_ours(model, read_weights(checkpoint)), what=f"model {name!r}")
    return model


def load_model(path: str | Path, prefer: str = "best", **overrides) -> tuple[nn.Module, dict]:
    """(model in eval mode, manifest) of a run folder or checkpoint folder.

    overrides  constructor arguments that replace the recorded ones
    Only classes of ssmzoo.models are built; raises CheckpointError for anything damaged, foreign or misfitting.
    """
    folder = find_checkpoint(path, prefer)
    manifest = read_manifest(folder)
    node = manifest.get("config", {}).get("model")
    if not isinstance(node, dict) or "_target_" not in node:
        raise CheckpointError(f"{folder / MANIFEST} has no config.model to build the model from")
    try:
        model = build_model(node | overrides)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model of {folder} cannot be built: {error}") from None
    fit_state_dict(
        model, weights_of(folder, manifest), what=f"{manifest.get('model', 'the model')} as its manifest describes it"
    )
    return model.eval(), manifest
