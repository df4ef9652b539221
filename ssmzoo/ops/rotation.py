"""Rotations of joints: axis-angle, matrices, the 6-dimensional form, and positions of a skeleton.

The 6-dimensional form is the first two rows of the matrix (Zhou et al., CVPR 2019, in PyTorch3D's convention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_angle_to_matrix(r: Tensor) -> Tensor:
    """(... 3) in radians -> (... 3 3), by Rodrigues' formula."""
    angle = r.norm(dim=-1, keepdim=True).unsqueeze(-1)  # (... 1 1)
    x, y, z = (r / angle.squeeze(-1).clamp(min=1e-8)).unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
    one = torch.eye(3, dtype=r.dtype, device=r.device)
    return one + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def matrix_to_6d(m: Tensor) -> Tensor:
    """(... 3 3) -> (... 6)."""
    return m[..., :2, :].flatten(-2)


def matrix_of_6d(d: Tensor) -> Tensor:
    """(... 6) -> (... 3 3), by Gram-Schmidt."""
    a, b = d.unflatten(-1, (2, 3)).unbind(-2)
    a = torch.nn.functional.normalize(a, dim=-1)
    b = torch.nn.functional.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -2)


def geodesic(a: Tensor, b: Tensor) -> Tensor:
    """Angle in radians between rotations (... 3 3) -> (...); the cosine is clamped to +-(1 - 1e-6)."""
    cosine = ((a * b).sum((-1, -2)) - 1) / 2
    return torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))


def positions(rotation: Tensor, root: Tensor, offset: Tensor, parent: Sequence[int]) -> Tensor:
    """Forward kinematics: rotation (... j 3 3) of each joint in its parent's frame, root (... 3), offset (j 3) of each
    joint from its parent -> positions (... j 3) in offset's unit. parent[0] is -1, every parent comes before."""
    world, place = [rotation[..., 0, :, :]], [root + offset[0]]
    for joint in range(1, len(parent)):
        up = parent[joint]
        place.append(place[up] + (world[up] @ offset[joint].unsqueeze(-1)).squeeze(-1))
        world.append(world[up] @ rotation[..., joint, :, :])
    return torch.stack(place, -2)
