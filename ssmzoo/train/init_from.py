"""Start a training run from weights that exist: another scale's, another noise level's, a released file's."""

from __future__ import annotations

from torch import nn

from ssmzoo.checkpoint_files import read_weights
from ssmzoo.released.files import CheckpointError


def start_from(model: nn.Module, path: str) -> str:
    """Copy every tensor of a run folder, checkpoint or released file that fits by name and shape; the rest stays new.

    Released files are read by their own names, which are ours for most models, `params` and `params_ema` included.
    Returns a sentence on what was taken. Raises CheckpointError when less than half of the model's values are there.
    """
    found = {key.removeprefix("module."): value for key, value in read_weights(path).items()}
    own = model.state_dict()
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    new = [k for k in own if k not in fits]
    taken, total = (sum(own[k].numel() for k in keys) for keys in (fits, own))
    if 2 * taken < total:
        raise CheckpointError(
            f"init_from={path}: only {len(fits)} of the model's {len(own)} tensors are there with "
            f"the same shape ({taken:,} of {total:,} values); are these weights of another model?"
        )
    model.load_state_dict(fits, strict=False)
    more = f"; new: {', '.join(new[:4])}{' ...' if len(new) > 4 else ''}" if new else ""
    return f"starting from {path}: {len(fits)} of {len(own)} tensors{more}"
