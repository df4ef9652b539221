"""Hidden attention: the causal matrix that every channel of a selective scan multiplies its input with.

    alpha[i, j] = sum_n C_i[n] exp(A[n] (S_i - S_j)) delta_j B_j[n],   j <= i,   S = cumulative sum of delta
    y_i = sum_j alpha[i, j] u_j + D u_i

The exponents are differences of sums of logarithms, never ratios of products, which would underflow.
With convolution M (banded Toeplitz), SiLU and gate folded in:  F = diag(SiLU(z)) alpha diag(sigmoid(c)) M,
y = F x + SiLU(z) D u when the convolution has no bias; c is the convolution's output before its SiLU.

b batch, e channels, l length, n state size.
Source: Ali, Zimerman & Wolf (arXiv 2403.01590); the folded form: arXiv 2405.16504.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmzoo.probes.tap import DenseScan, Scan, tap

MATRIX_BYTES = 1 << 30
CHUNK_BYTES = 1 << 25  # matrices worked on at a time: faster than more at once, and the work stays small
WORK = 5  # matrices that the work on one of them holds beside it


def attention(scan: Scan, reorder: bool = True, max_bytes: int = MATRIX_BYTES) -> Tensor:
    """alpha (b e l l) of the scan's channels; rows are outputs, columns inputs.

    reorder    index both axes by the model's tokens, whatever the direction and order of the scan; False: by its own
               steps
    max_bytes  what the matrices and the work on them may take; a ValueError names the bound

    Where states are fused on a map before they are read (Spatial-Mamba) the rows are fused likewise and no longer
    causal; where tokens are sorted softly in front of the scan the columns are those of the unsorted tokens.
    """
    scan.whole("attention")
    b, e, l = scan.u.shape
    one = scan.u.element_size() * b * l * l  # bytes of a channel
    if one * (e + WORK) > max_bytes:
        raise ValueError(
            f"{b} x {e} matrices of {l} x {l} take {one * (e + WORK):,} bytes, more than max_bytes = "
            f"{max_bytes:,}: choose fewer channels (scan.take), single rows (attention_rows), a shorter "
            f"input, or raise max_bytes"
        )
    chunk = max(1, min(e, (max_bytes // one - e) // WORK, CHUNK_BYTES // one))
    parts = [scan if chunk >= e else scan.take(range(i, min(i + chunk, e))) for i in range(0, e, chunk)]
    alpha = [_matrices(part) for part in parts]
    alpha = alpha[0] if len(alpha) == 1 else torch.cat(alpha, dim=1)
    return to_tokens(alpha, scan) if reorder else alpha


def _matrices(scan: Scan) -> Tensor:
    """alpha (b e l l) by steps, holding about WORK of them at a time."""
    l, S = scan.length, scan.delta.cumsum(-1)  # (b e l)
    causal = causal_mask(scan)
    span = (S[..., :, None] - S[..., None, :]).masked_fill(~causal, 0.0)  # (b e i j)
    C, B = scan.read(), scan.write()  # (b e l n)
    C = torch.ones_like(B) if scan.fusion is not None else C  # read behind the fusion
    alpha: Tensor | float = 0.0
    for i in range(scan.A.shape[1]):
        alpha = alpha + torch.exp(scan.A[:, i, None, None] * span) * C[..., :, None, i] * B[..., None, :, i]
    alpha = alpha.masked_fill(~causal, 0.0)
    if scan.own is not None:
        own = scan.own * (C * scan.per_channel(scan.B)).sum(-1)
        alpha = alpha - torch.diag_embed(alpha.diagonal(dim1=2, dim2=3) - own)
    if scan.fusion is not None:
        columns = alpha.movedim(3, 1).flatten(0, 1)  # (bl e l): every column is a map of states
        alpha = scan.fusion(columns).unflatten(0, (-1, l)).movedim(1, 3) * scan.read()
    return alpha


def causal_mask(scan: Scan) -> Tensor:
    """Which step may see which, (l l) or (b 1 l l) with documents."""
    l = scan.length
    causal = torch.ones(l, l, dtype=torch.bool, device=scan.u.device).tril()
    if scan.seq_idx is None:
        return causal
    changes = (scan.seq_idx[:, 1:] != scan.seq_idx[:, :-1]).cumsum(1)
    document = torch.nn.functional.pad(changes, (1, 0))  # (b l)
    return causal & (document[:, None, :, None] == document[:, None, None, :])


def to_tokens(matrix: Tensor, scan: Scan) -> Tensor:
    """(b e l l) indexed by steps -> by tokens, channel by channel."""
    tokens = scan.step_tokens()
    if tokens is not None:
        step = tokens.argsort(-1)  # (e l) or (b e l): step of every token
        matrix = matrix.gather(2, step[..., :, None].expand_as(matrix))
        matrix = matrix.gather(3, step[..., None, :].expand_as(matrix))
    return matrix if scan.mixture is None else matrix @ scan.mixture[:, None]


def attention_rows(scan: Scan, rows: Sequence[int]) -> Tensor:
    """Some rows of alpha, (b e rows l), by steps, in O(l n) per channel and row."""
    scan.whole("attention")
    if scan.fusion is not None:
        return attention(scan, reorder=False)[:, :, list(rows)]
    S, C, B = scan.delta.cumsum(-1), scan.read(), scan.write()
    causal, steps = causal_mask(scan), torch.arange(scan.length, device=S.device)
    out = []
    for row in rows:
        seen = causal[..., row, :].expand_as(S)
        span = (S[..., row, None] - S).masked_fill(~seen, 0.0)[..., None]
        weights = (torch.exp(scan.A[:, None] * span) * B * C[:, :, row, None]).sum(-1).masked_fill(~seen, 0.0)
        if scan.own is not None:
            own = scan.own[..., row] * (C[:, :, row] * scan.per_channel(scan.B)[:, :, row]).sum(-1)
            weights = torch.where(steps == row, own[..., None], weights)
        out.append(weights)
    return torch.stack(out, dim=2)


def attention_row(scan: Scan, row: int) -> Tensor:
    """One row of alpha, (b e l), by steps."""
    return attention_rows(scan, [row])[:, :, 0]


def carried(scan: Scan) -> Tensor:
    """What the state before the first step adds to every output, (b e l), by steps: <C, exp(A S) h_0>."""
    decay = torch.exp(scan.delta.cumsum(-1)[..., None] * scan.A[:, None])  # (b e l n)
    y = (decay * scan.initial_state[:, :, None] * scan.read()).sum(-1)
    if scan.seq_idx is None:
        return y
    first = torch.nn.functional.pad((scan.seq_idx[:, 1:] == scan.seq_idx[:, :-1]).long().cumprod(1), (1, 0), value=1)
    return y * first[:, None]


def scan_output(scan: Scan, max_bytes: int = MATRIX_BYTES) -> Tensor:
    """alpha u + D u (b e l), by steps: the scan's output before its gate."""
    y = torch.einsum("beij,bej->bei", attention(scan, False, max_bytes), scan.u)
    y = y if scan.D is None else y + scan.D[:, None] * scan.u
    return y if scan.initial_state is None else y + carried(scan)


def exactness(scan: Scan, max_bytes: int = MATRIX_BYTES) -> float:
    """|alpha u + D u, gated where the operator gates, - y| / |y|"""
    y = scan_output(scan, max_bytes)
    y = y if scan.z is None else y * torch.nn.functional.silu(scan.z)
    return float((y - scan.y).norm() / scan.y.norm().clamp(min=1e-30))


def implicit_attention(scan: Scan, reorder: bool = True) -> Tensor:
    """F (b e l l): alpha with the convolution, its SiLU and the gate folded in, without skip D and bias."""
    if scan.conv is None:
        raise ValueError(f"{scan.name} has no causal convolution in front of its scan; `attention` is all there is")
    scan.whole("attention")
    l, taps = scan.u.shape[-1], scan.conv.weight.shape[1]
    lag = torch.arange(l)[:, None] - torch.arange(l)[None]  # i - j
    M = scan.conv.weight[:, (taps - 1 - lag).clamp(0, taps - 1)] * ((lag >= 0) & (lag < taps)).to(scan.u.device)
    F_ = (attention(scan, reorder=False) * scan.conv.output().sigmoid()[..., None, :]) @ M
    if scan.z is not None:
        F_ = torch.nn.functional.silu(scan.z)[..., None] * F_
    return to_tokens(F_, scan) if reorder else F_


def class_row(scan: Scan, token: int, missing_decay: bool = False) -> Tensor:
    """How much `token` reads from every other token, (b e l): forward channels before it, backward ones behind it.

    scan           two directions of e channels each, as in Vim; column `token` itself is 0
    missing_decay  as the released code has it: without the factor exp(delta A) of the reading step itself
    """
    if scan.directions != 2:
        raise ValueError(
            f"{scan.name} scans in {scan.directions} directions; the row of a class token in the middle needs two"
        )
    e, l = scan.total // 2, scan.u.shape[-1]
    parts = []
    for half, row in ((range(e), token), (range(e, 2 * e), l - 1 - token)):
        part = scan.take(half)
        if missing_decay:
            part.delta = part.delta.index_fill(-1, torch.tensor([row], device=part.delta.device), 0.0)
        weights = attention_row(part, row)
        parts.append(weights.masked_fill(torch.arange(l, device=weights.device) == row, 0.0))
    return parts[0] + parts[1].flip(-1)


def dense_map(scan: DenseScan) -> Tensor:
    """How strongly SD-SSM carries token j to step i: the spectral norm of T_i ... T_{j+1}, (b l l)"""
    T, l = scan.transitions, scan.transitions.shape[1]
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    out = T.new_zeros(len(T), l, l)
    carried = T.new_zeros(len(T), l, *T.shape[-2:])
    for i in range(l):
        carried[:, :i] = T[:, i, None] @ carried[:, :i]
        carried[:, i] = eye
        out[:, i, : i + 1] = torch.linalg.matrix_norm(carried[:, : i + 1], 2)
    return out


# ---- the probe ------------------------------------------------------------------------------------------------------


def probe(subject):
    """Matrices of some channels, token maps of every layer, how exactly they reproduce the scans, and explanations."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.explain import token_map
    from ssmzoo.probes.subject import Finding

    with torch.no_grad(), tap(subject.model, layers=subject.layers, rows=1, max_bytes=subject.max_bytes) as scans:
        subject.model(subject.inputs[:1])
    finding, maps, reads = Finding(), {}, []
    diagonal = [s for s in scans if isinstance(s, Scan)]
    for number, scan in enumerate(scans):
        key = f"{number}: {scan.name}"
        if isinstance(scan, DenseScan):
            maps[key] = dense_map(scan)[0]
            continue
        some = scan.take(shown_channels(scan, subject.channels))
        if subject.positions is not None:
            reads.append((key, some, attention_rows(some, in_range(subject.positions, scan.length))[0]))
            continue
        maps[key] = token_map(scan, torch.abs, max(1, len(scan.channels) // 32), subject.max_bytes)[0]
        finding.summary[f"{key}, |alpha u + D u - scan| / |scan|"] = f"{exactness(some, subject.max_bytes):.1e}"
    if reads:
        _rows_of_channels(finding, reads, subject)
    if maps:
        columns = min(4, len(maps))
        figure, axes = figures.canvas(-(-len(maps) // columns), columns)
        for axis, (key, m) in zip(axes.flat, maps.items()):
            figures.heat(figure, axis, m, "token read", "token reading", key, label="weight")
        for axis in list(axes.flat)[len(maps) :]:
            axis.set_axis_off()
        finding.figures["token_maps"] = figure
        rows = [(key, len(m) - 1, j, f"{float(w):.6g}") for key, m in maps.items() for j, w in enumerate(m[-1])]
        finding.tables["last_row"] = (("layer", "reader", "read", "weight"), rows)
    if diagonal and subject.positions is None:
        finding.figures["channels"] = _channel_figure(diagonal, subject)
        _explanations(finding, subject)
    return finding


def shown_channels(scan: Scan, channels) -> list[int]:
    """The channels asked for, or one of the first and one of a later direction."""
    if channels is not None:
        return list(channels)
    return [0, scan.total // 2] if scan.directions > 1 else list(range(min(2, scan.total)))


def in_range(positions, length: int) -> list[int]:
    wrong = [p for p in positions if not -length <= p < length]
    if wrong:
        raise ValueError(f"positions {wrong} do not exist: the scan has {length} steps, numbered from 0")
    return [p % length for p in positions]


def _rows_of_channels(finding, reads, subject) -> None:
    """Only the rows asked for, in memory linear in the length."""
    from ssmzoo.probes import figures

    shown, rows = reads[:4], []
    for key, scan, weights in reads:
        for c, channel in enumerate(scan.channels.tolist()):
            rows += [
                (key, channel, p, j, f"{float(w):.6g}")
                for i, p in enumerate(subject.positions)
                for j, w in enumerate(weights[c, i])
                if w != 0
            ]
    finding.tables["rows"] = (("layer", "channel", "reading step", "step read", "alpha"), rows)
    finding.summary["rows of alpha"] = f"{len(rows):,} weights of steps {', '.join(map(str, subject.positions))}"
    figure, axes = figures.canvas(len(shown), 1, (6, 2.6))
    for axis, (key, scan, weights) in zip(axes[:, 0], shown):
        curves = {
            f"channel {int(scan.channels[c])}, step {p}": weights[c, i].abs()
            for c in range(len(weights))
            for i, p in enumerate(subject.positions)
        }
        figures.lines(axis, range(scan.length), dict(list(curves.items())[:7]), "step read", "|alpha|", key)
    finding.figures["rows"] = figure


def _explanations(finding, subject) -> None:
    """Raw attention, rollout and attribution for all inputs, shown for the first, and how true they are."""
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.explain import ATTENTION_METHODS, attention_layers, attention_scores, class_row_scores
    from ssmzoo.probes.faithfulness import evaluate, with_special
    from ssmzoo.probes.relevance import explained, scores_figure

    try:
        entry = enter(subject.model, subject.inputs)
        target = explained(subject, entry)
        layers = attention_layers(entry, target, 64, subject.layers, subject.channels, subject.max_bytes)
    except ValueError as error:
        if "max_bytes" in str(error) or "target" in str(error):
            raise
        finding.summary["explanation maps"] = str(error)
        return
    scores = {m: attention_scores(entry, layers, m) for m in ATTENTION_METHODS} | class_row_scores(entry, layers)
    scores = {m: with_special(entry, s.detach()) for m, s in scores.items()}
    finding.summary["explained"] = f"'{subject.answer(int(target[0]))}'"
    finding.figures["explanations"] = scores_figure(subject, entry, scores)
    finding.tables["explanations"] = (
        ("place", "token", *scores),
        [
            (i, "" if subject.is_image else subject.token(i), *(f"{float(s[0, i]):.6g}" for s in scores.values()))
            for i in range(entry.values.shape[1])
        ],
    )
    evaluate(finding, subject, entry, target, scores)


def _channel_figure(scans: list[Scan], subject):
    from ssmzoo.probes import figures
    from ssmzoo.probes.attribution_maps import min_max

    shown = scans[: min(4, len(scans))]
    figure, axes = figures.canvas(len(shown), 4)
    for row, scan in zip(axes, shown):
        channels = list(subject.channels or [i * scan.total // 4 for i in range(4)])[:4]
        matrices = attention(scan.take(channels), True, subject.max_bytes)[0]
        for axis, channel, matrix in zip(row, channels, matrices):
            figures.heat(
                figure,
                axis,
                min_max(matrix.abs()),
                "token read",
                "token reading",
                f"{scan.name}, channel {channel}",
                label="|alpha|, min-max",
            )
        for axis in row[len(channels) :]:
            axis.set_axis_off()
    return figure
