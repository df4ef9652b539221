"""Models by name, with weights: fresh ones, released ones, or those of a run folder or checkpoint of ours."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ssmzoo import presets
from ssmzoo.adapt.quantise.stored import restructure
from ssmzoo.checkpoint_files import MANIFEST, find_checkpoint, read_manifest, read_weights, weights_of
from ssmzoo.moved import names
from ssmzoo.released.catalogue import find_weights, split_name
from ssmzoo.released.family import to_ours
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.fit import fit_state_dict
from ssmzoo.released.pretrained import build_pretrained

QUANTISATION = "quantisation"  # section of a manifest: the form of a model of integers (ssmzoo.adapt.quantise.stored)
OLD = "build_model config_dir config_names describe_config list_models model_class read_model_config".split()
__getattr__ = names(__name__, dict.fromkeys(OLD, "ssmzoo.presets"))


def create_model(name: str, *, pretrained: bool | str = False, checkpoint: str | None = None, **overrides) -> nn.Module:
    """Build a model of the zoo by name.

    name        one of `list_models()`, or with the tag of a released file: "mambair_denoise.sigma25"
    pretrained  True or a tag: with the weights that its authors released, fetched if need be (`ssmzoo weights list`)
    checkpoint  a run folder or checkpoint of ours, or a released file in official names, whose weights are loaded; its
                architecture must be the one asked for
    overrides   constructor arguments that replace the preset's. A pretrained classifier with another num_classes gets a
                new head, with a warning.

    Sizes that a data set decides when training (vocab_size, num_classes) take the constructor's default unless given.
    Raises ValueError for an unknown name, TypeError for an unknown argument, DownloadError for weights that cannot be
    had.
    """
    preset, tag = (name, "") if name in presets.config_names("model") else split_name(name)
    if pretrained and checkpoint is not None:
        raise ValueError("give either pretrained or checkpoint: both name weights")
    if pretrained:
        if tag and pretrained not in (True, tag):
            raise ValueError(f"{name!r} names the file {tag!r} and pretrained the file {pretrained!r}")
        presets.read_model_config(preset)  # a misspelt name is no missing file
        return build_pretrained(find_weights(preset, tag or pretrained), **overrides)
    if tag:
        raise ValueError(f"{name!r} names released weights; add pretrained=True, or leave out .{tag} for a fresh model")
    model = presets.build_preset(preset, **overrides)
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
        model = build_recorded(manifest, node | overrides)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model of {folder} cannot be built: {error}") from None
    what = f"{manifest.get('model', 'the model')} as its manifest describes it"
    fit_state_dict(model, weights_of(folder, manifest), what=what, assign=QUANTISATION in manifest)
    return model.eval(), manifest


def build_recorded(manifest: dict, node: dict) -> nn.Module:
    """The model that a manifest describes, without its weights: layers of integers where it was quantised.

    node  class and constructor arguments, from the manifest's configuration. Raises ValueError, TypeError.
    """
    model = presets.build_model(node)
    return restructure(model, manifest[QUANTISATION]) if QUANTISATION in manifest else model
