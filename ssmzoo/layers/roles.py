"""What a parameter is, by its name: the one place from which weight decay, adapters and reports take it.

A model whose parameters have other names and should not decay lists them in `no_weight_decay()`, as in timm.
"""

from __future__ import annotations

import re

ROLES = {  # role: pattern of the whole name
    "A_log": r"A(_b)?_logs?",
    "D": r"D(_b|s)?",
    "bias": r"bias|dt_bias|dt_projs_bias",
    "initial state": r"init_states",
    "position": r"(absolute_)?pos_embed\w*",
    "class token": r"cls_token\w*",
    "relative position": r"relative_position_bias_table",
}
EMBEDDED = ("position", "class token")  # added to the tokens, or tokens themselves
HEADS = ("head", "lm_head", "classifier", "readout")  # modules that read out classes or tokens
TABLES = (*EMBEDDED, "relative position")  # no matrices, though they have two or more dimensions


def named_role(name: str) -> str | None:
    """'A_log', 'D', 'bias', ... of a parameter whose last name says what it is; None for all others."""
    leaf = name.rpartition(".")[2]
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, leaf)), None)


def in_head(path: str) -> bool:
    """Whether a module is its model's head, or lies in it. path: its name in the model, such as "readout.0"."""
    return path.partition(".")[0] in HEADS or path.rpartition(".")[2] in HEADS
