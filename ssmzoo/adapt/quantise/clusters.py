"""Sort and cluster: channels of the scan input that look alike stand together and share a scale.

Per SSD group: (a) inside every head the channels by their mean |x|, ascending; (b) the heads' sorted vectors, of length
1, into clusters by Ward's criterion, heads ordered by cluster; (c) inside every cluster of heads the positions of the
channels into clusters by k-means, started at evenly spaced positions, so that clusters are neighbours.
Heads never leave their SSD group. Source: Chiang et al. 2025 (arXiv 2503.22879), section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLUSTERS = 4


class Order(NamedTuple):
    """channels (h p), heads (h): old numbers at new positions; head_sizes (g, nh), channel_sizes (g, nh, nc)"""

    channels: Tensor
    heads: Tensor
    head_sizes: Tensor
    channel_sizes: Tensor

    def parts(self) -> Tensor:
        """(h p) the number of the cluster (group, heads, channels) that every channel, in its new place, is in."""
        numbers, n = [], 0
        for heads, channels in zip(self.head_sizes.flatten().tolist(), self.channel_sizes.flatten(0, 1)):
            one = torch.repeat_interleave(torch.arange(n, n + len(channels)), channels.long())
            numbers.append(one.repeat(heads))
            n += len(channels)
        return torch.cat(numbers)


def why_not_clustered(heads: int, headdim: int, clusters: int = CLUSTERS) -> str | None:
    """The reason when heads of one SSD group cannot be clustered."""
    if heads < clusters:
        return f"{heads} heads per SSD group are fewer than the {clusters} clusters"
    return f"headdim = {headdim} is not divisible by the {clusters} clusters" if headdim % clusters else None


def sort_and_cluster(
    statistic: Tensor,
    headdim: int,
    ngroups: int,
    head_clusters: int = CLUSTERS,
    channel_clusters: int = CLUSTERS,
    as_released: bool = False,
) -> Order:
    """statistic (h p): mean |x| of every channel. ValueError for heads that cannot be clustered.

    as_released  the released code takes the heads of a cluster from the heads before they were ordered, so that channel
                 positions are clustered on other heads than they are used for
    """
    nheads = len(statistic) // headdim
    per_group = nheads // ngroups
    if reason := why_not_clustered(per_group, headdim, max(head_clusters, channel_clusters)):
        raise ValueError(f"channels cannot be clustered: {reason}; quantise without (--no-reorder, reorder=False)")
    s = statistic.detach().double().cpu().numpy().reshape(ngroups, per_group, headdim)
    order = np.argsort(s, axis=2, kind="stable")
    ordered = np.take_along_axis(s, order, axis=2)
    channels, heads, head_sizes, channel_sizes = [], [], [], []
    for g in range(ngroups):
        directions = ordered[g] / np.maximum(np.linalg.norm(ordered[g], axis=1, keepdims=True), 1e-12)
        labels = ward(directions, head_clusters)
        by_label = np.argsort(labels, kind="stable")
        heads += (by_label + g * per_group).tolist()
        sizes = np.bincount(labels, minlength=head_clusters)
        head_sizes.append(sizes)
        members = np.split(directions if as_released else directions[by_label], np.cumsum(sizes)[:-1])
        channel_sizes.append([positions(heads_of, channel_clusters) for heads_of in members])
        channels += [((g * per_group + h) * headdim + order[g, h]) for h in by_label]
    return Order(
        torch.from_numpy(np.concatenate(channels)).long(),
        torch.tensor(heads),
        torch.from_numpy(np.stack(head_sizes)).int(),
        torch.tensor(np.array(channel_sizes), dtype=torch.int32),
    )


def ward(vectors: np.ndarray, n: int) -> np.ndarray:
    """Labels (h) of heads, given as directions (h p)."""
    from sklearn.cluster import AgglomerativeClustering

    return AgglomerativeClustering(n_clusters=n, linkage="ward").fit_predict(vectors)


def positions(vectors: np.ndarray, n: int) -> list[int]:
    """Sizes of the clusters of neighbouring channel positions of heads (h p); equal ones where k-means mixes them."""
    from sklearn.cluster import KMeans

    points = vectors.T  # (p h)
    start = points[:: len(points) // n][:n]
    labels = (
        KMeans(n_clusters=n, init=start, n_init=1).fit_predict(points) if len(np.unique(points, axis=0)) >= n else []
    )
    sizes = np.bincount(labels, minlength=n) if len(labels) else np.zeros(n)
    if not len(labels) or (np.diff(labels) < 0).any() or (sizes == 0).any():
        return [len(points) // n] * n
    return sizes.tolist()
