"""Start a training run from weights that exist: another scale's, another noise level's, a released file's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ssmzoo.adapt.upcycle import upcycled_state
from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
from ssmzoo.released.catalogue import find_weights
from ssmzoo.released.family import to_ours
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.fit import Taken, compare, role, share
from ssmzoo.released.pretrained import released_state
from ssmzoo.zoo import QUANTISATION


def start_from(model: nn.Module, path: str, upcycle: float = 0.5, classes: Sequence[str] | None = None) -> str:
    """Copy the weights of a run folder, checkpoint or released file into a model; returns a sentence on what was taken.

    Official names are translated. A head or another layer of another shape (classes, scale) stays new and is listed
    with its share of the parameters, as is a layer that the file lacks. Where the model has experts and the file a
    dense feed-forward, the experts are its copies, of whose hidden units a share `upcycle` is drawn anew. A head of a
    run folder whose classes are named otherwise than `classes` stays new, even where its shape fits. A model that
    names a `first_stage` takes a file without that part's name as the weights of it. Raises
    CheckpointError when an embedding or a norm would stay new, when a head is not in the file, or when less than half
    of the model's values are there.
    """
    refuse_integers(path)
    found = to_ours(model, read_weights(path))
    if (stage := getattr(model, "first_stage", None)) and not any(key.startswith(f"{stage}.") for key in found):
        return f"{take(model.get_submodule(stage), found, f'init_from={path}', str(path))}, into model.{stage}"
    experts = upcycled_state(model, found, upcycle)
    made = [key for key in experts if key not in found or experts[key].shape != found[key].shape]
    others = _other_classes(path, classes)
    heads = [name for name in model.state_dict() if others and role(model, name) == "head"]
    said = take(model, experts, f"init_from={path}", str(path), heads)
    said += "; the head is new: these weights tell other classes apart" if heads else ""
    return f"{said}; experts made of dense layers, {upcycle:.0%} of their units drawn anew" if made else said


def start_pretrained(model: nn.Module, name: str, tag: str | bool) -> str:
    """As `start_from`, with the released weights of a preset, which are fetched if need be."""
    entry = find_weights(name, tag)
    return take(model, released_state(model, entry), f"pretrained={tag}", f"{entry.name} ({entry.source})")


def refuse_integers(path: str) -> None:
    """Raise CheckpointError for a quantised checkpoint: its integers are no weights to train."""
    try:
        manifest = read_manifest(find_checkpoint(path))
    except CheckpointError:  # a released file or folder
        return
    if QUANTISATION in manifest:
        made_of = manifest[QUANTISATION].get("made_of", "the checkpoint it was made of")
        raise CheckpointError(f"{path} is quantised, its integers cannot be trained; start from {made_of}")


def _other_classes(path: str, classes: Sequence[str] | None) -> bool:
    """Whether the weights are of a run whose classes have other names, or another order."""
    if classes is None or not Path(path).is_dir():
        return False
    try:
        theirs = read_manifest(find_checkpoint(path)).get("classes")
    except CheckpointError:  # a released folder
        return False
    return theirs is not None and list(theirs) != list(classes)


def take(model: nn.Module, found: dict[str, Tensor], asked: str, source: str, fresh: Sequence[str] = ()) -> str:
    """Copy what fits, except `fresh`; raise CheckpointError for what must not stay new.

    `asked` and `source` are for the messages.
    """
    found = {name: value for name, value in found.items() if name not in fresh}
    own, taken = model.state_dict(), compare(model, found)
    values, total = (sum(own[k].numel() for k in keys) for keys in (taken.fits, own))
    if 2 * values < total:
        raise CheckpointError(
            f"{asked}: only {len(taken.fits)} of the model's {len(own)} tensors are there with "
            f"the same shape ({values:,} of {total:,} values); are these weights of another model?"
        )
    if problem := _missing(model, found, taken, fresh):
        raise CheckpointError(f"{asked}: {problem}")
    model.load_state_dict(taken.fits, strict=False)
    new = taken.reshaped + taken.absent
    more = f"; new: {', '.join(new[:4])}{' ...' if len(new) > 4 else ''} ({share(model, new)})" if new else ""
    left = [k for k in found if k not in own]
    more += f"; not used: {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else ""
    return f"starting from {source}: {len(taken.fits)} of {len(own)} tensors{more}"


def _missing(model: nn.Module, found: dict, taken: Taken, fresh: Sequence[str]) -> str:
    """What must not be left at its random start, in words; '' when nothing of that kind would be."""
    for name in taken.absent:
        if name not in fresh and (kind := role(model, name)):
            return f"{name} ({kind}) is not in the file, so it would start from random values"
    for name in taken.reshaped:
        if (kind := role(model, name)) in ("embedding", "norm"):
            here, there = (tuple(s[name].shape) for s in (model.state_dict(), found))
            return f"{name} ({kind}) is {there} in the file and {here} in the model: it would start from random values"
    return ""
