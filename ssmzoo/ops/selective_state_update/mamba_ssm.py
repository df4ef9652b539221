"""selective_state_update on mamba-ssm's kernel."""

from __future__ import annotations

from ssmzoo.ops.eager import needs_grad
from ssmzoo.ops.mamba_ssm import install, load, refuses
from ssmzoo.ops.selective_state_update import selective_state_update

UPDATE = ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")


def why_not(a) -> str | None:
    given = a[: a._fields.index("dt_softplus")]
    return (
        "mamba-ssm's step has no backward; the torch backend does" if needs_grad(*given) else refuses(*UPDATE, *given)
    )


@selective_state_update.register("mamba_ssm", unsupported=why_not, **install(*UPDATE))
def selective_state_update_mamba_ssm(a):
    given = a._asdict()
    if a.state_batch_indices is None:
        del given["state_batch_indices"]  # releases before 2.2.3 have none
    return load(*UPDATE)[0](**given)
