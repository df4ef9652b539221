"""The 55 joints of SMPL-X as a tree, a stick figure of ours for drawing, and MambaTalk's four parts of a body.

    face 106 = jaw 6 + 100 expressions;  upper 78, hands 180 = 13 and 30 joints x 6;  lower 61 = 9 joints x 6, velocity
    x, height y, velocity z (metres, per second) and 4 foot contacts;  whole 337 = 55 joints x 6 + these 3 + these 4

The body model of SMPL-X needs a licence: bone lengths here are round numbers of ours, in metres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.rotation import axis_angle_to_matrix, matrix_to_6d, positions

FPS = 30
LEGS_TO_WRISTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)


def _tree() -> list[int]:
    """Parents: body to wrists, jaw and eyes on the head, five fingers of three joints on either wrist."""
    parent = [*LEGS_TO_WRISTS, 15, 15, 15]
    for wrist in (20, 21):
        for _ in range(5):
            first = len(parent)
            parent += [wrist, first, first + 1]
    return parent


PARENT = _tree()
JOINTS = len(PARENT)
UPPER = (3, 6, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)
LOWER = (0, 1, 2, 4, 5, 7, 8, 10, 11)
HANDS = tuple(range(25, 55))
JAW, FEET, BEAT_JOINTS = 22, (7, 8, 10, 11), (3, 6, 9, *range(12, 22))
CHANNELS = {"face": 106, "upper": 78, "hands": 180, "lower": 61}


def offsets() -> Tensor:
    """(55 3) metres from the parent; y up, x to the figure's left."""
    o = torch.zeros(JOINTS, 3)
    o[0, 1] = 0.95
    for joint, place in {
        **{1: (0.1, -0.08, 0), 2: (-0.1, -0.08, 0), 3: (0, 0.1, 0), 4: (0, -0.4, 0), 5: (0, -0.4, 0)},
        **{6: (0, 0.13, 0), 7: (0, -0.4, 0), 8: (0, -0.4, 0), 9: (0, 0.13, 0), 10: (0, -0.05, 0.12)},
        **{11: (0, -0.05, 0.12), 12: (0, 0.18, 0), 13: (0.08, 0.12, 0), 14: (-0.08, 0.12, 0), 15: (0, 0.1, 0.02)},
        **{16: (0.1, 0, 0), 17: (-0.1, 0, 0), 18: (0.05, -0.26, 0), 19: (-0.05, -0.26, 0)},
        **{20: (0.03, -0.24, 0.03), 21: (-0.03, -0.24, 0.03), 22: (0, 0.02, 0.05)},
        **{23: (0.03, 0.08, 0.07), 24: (-0.03, 0.08, 0.07)},
    }.items():
        o[joint] = torch.tensor(place)
    for joint in HANDS:
        finger = (joint - 25) % 15 // 3
        o[joint] = torch.tensor([0, -0.06 if PARENT[joint] in (20, 21) else -0.025, 0.012 * (finger - 2)])
    return o


def joints_of(whole: Tensor) -> Tensor:
    """Positions (... l 55 3) in metres of whole motion (... l 337); the root moves by the velocities in it."""
    from ssmzoo.ops.rotation import matrix_of_6d

    rotation = matrix_of_6d(whole[..., : 6 * JOINTS].unflatten(-1, (JOINTS, 6)))
    moved = whole[..., 6 * JOINTS : 6 * JOINTS + 3]
    root = torch.cat([torch.zeros_like(moved[..., :1, :]), moved[..., :-1, :] / FPS], -2).cumsum(-2)
    root = torch.stack([root[..., 0], moved[..., 1], root[..., 2]], -1)
    return positions(rotation, root, offsets().to(whole), PARENT)


def whole_motion(poses: Tensor, place: Tensor) -> Tensor:
    """(l 337) of axis-angles (l 55 3) and the root's place (l 3) in metres."""
    rotation = matrix_to_6d(axis_angle_to_matrix(poses)).flatten(-2)
    moved = torch.diff(place, dim=0, append=place[-1:]) * FPS
    moved = torch.stack([moved[:, 0], place[:, 1], moved[:, 2]], -1)
    still = torch.zeros(len(poses), 4, dtype=rotation.dtype)
    feet = joints_of(torch.cat([rotation, moved, still], -1))[:, FEET]
    speed = torch.diff(feet, dim=0, append=feet[-1:]).norm(dim=-1)
    return torch.cat([rotation, moved, (speed < 0.01).to(rotation.dtype)], -1)


def parts_of(whole: Tensor, expression: Tensor) -> dict[str, Tensor]:
    """{part: (... l channels)} of whole motion (... l 337) and expressions (... l 100)."""
    rotation = whole[..., : 6 * JOINTS].unflatten(-1, (JOINTS, 6))
    found = {name: rotation[..., list(js), :].flatten(-2) for name, js in (("upper", UPPER), ("hands", HANDS))}
    found["face"] = torch.cat([rotation[..., JAW, :], expression], -1)
    return found | {"lower": torch.cat([rotation[..., list(LOWER), :].flatten(-2), whole[..., 6 * JOINTS :]], -1)}


def whole_of(parts: dict[str, Tensor]) -> Tensor:
    """(... l 337) of the parts; the eyes look ahead."""
    face = parts["face"]
    ahead = torch.tensor([1.0, 0, 0, 0, 1, 0]).to(face)
    rotation = ahead.expand(*face.shape[:-1], JOINTS, 6).clone()
    rotation[..., JAW, :] = face[..., :6]
    for name, js in (("upper", UPPER), ("hands", HANDS), ("lower", LOWER)):
        rotation[..., list(js), :] = parts[name][..., : 6 * len(js)].unflatten(-1, (len(js), 6))
    return torch.cat([rotation.flatten(-2), parts["lower"][..., 54:]], -1)
