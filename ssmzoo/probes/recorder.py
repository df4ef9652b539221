"""What a tap keeps of the scans that pass by: the layers, channels, rows and positions asked for, within a bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssmzoo.probes.modules import ModuleTracker
from ssmzoo.probes.scan import Convolution, DenseScan, Scan, Taps, step_numbers
from ssmzoo.probes.softmax_attention import Attention
from ssmzoo.probes.token_order import TokenOrder, order_of_scan


class Recorder:
    """Keeps scans of `model`; the arguments are those of `tap`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[int | str] | None,
        channels: Iterable[int] | None,
        rows: int | None,
        keep_graph: bool,
        max_bytes: int,
        positions: Iterable[int] | None,
        attention: bool,
    ):
        self.model, self.rows, self.keep_graph, self.max_bytes = model, rows, keep_graph, max_bytes
        self.attention = attention
        self.layers = None if layers is None else set(layers)
        self.channels = None if channels is None else torch.as_tensor(sorted(set(channels)), dtype=torch.long)
        self.positions = None if positions is None else list(dict.fromkeys(positions))
        self.found, self.modules = Taps(), ModuleTracker(model)
        self.calls: dict[str, int] = {}  # scans so far, by module
        self.ungated: tuple[Scan, TokenOrder | None] | None = None  # the scan whose layer has not gated yet

    def check(self) -> None:
        """Raise ValueError when nothing was scanned, or not what was asked for."""
        seen = sum(self.calls.values())
        if not seen:
            raise ValueError(
                f"{type(self.model).__name__} ran no scan{' and no attention' if self.attention else ''}, so there is "
                f"nothing to tap; {without_scans(self.model)}"
            )
        wrong = [w for w in self.layers or () if w not in self.calls and (isinstance(w, str) or not 0 <= w < seen)]
        if wrong:
            raise ValueError(
                f"layers {wrong} do not exist: the pass ran {seen} scans, numbered from 0, in {', '.join(self.calls)}"
            )

    @property
    def name(self) -> str:
        """Of the module at work."""
        return self.modules.current.name

    @property
    def notes(self) -> dict:
        """What its operators have said so far: "order", "mixture", "convolution"."""
        return self.modules.current.notes

    def asked(self) -> bool:
        """Whether the next scan of the module at work was asked for."""
        return self.layers is None or sum(self.calls.values()) in self.layers or self.name in self.layers

    def wanted(self, e: int | None = None) -> int | None:
        """Which call of its module this is, or None when it was not asked for; e: the channels it has."""
        asked, index = self.asked(), self.calls.get(self.name, 0)
        self.calls[self.name], self.ungated = index + 1, None
        if not asked:
            return None
        if e is not None and self.channels is not None and not all(0 <= c < e for c in self.channels.tolist()):
            raise ValueError(
                f"channels {self.channels.tolist()}: the scan in {self.name or 'the model'} has {e} "
                f"channels, numbered from 0"
            )
        return index

    def cut(self, t: Tensor | None, axis: int | None = None, batched: bool = True) -> Tensor | None:
        """The rows, and along `axis` the channels, asked for, in memory of their own."""
        if t is None:
            return None
        t = t if self.keep_graph else t.detach()
        t = t[: self.rows] if batched and self.rows is not None else t
        if axis is not None and self.channels is not None and t.shape[axis] > len(self.channels):
            t = t.index_select(axis, self.channels.to(t.device))
        if self.keep_graph or t.untyped_storage().nbytes() <= t.nbytes:
            return t
        return t.clone(memory_format=torch.contiguous_format)  # a view would keep all it is a view of alive

    def add(self, index, u, delta, A, B, C, D, z, y, initial_state=None, seq_idx=None, **more) -> None:
        """Keep a diagonal scan: arguments as the fields of `Scan`, uncut but for delta; `more` are further fields."""
        (b, e, l), name = u.shape, self.name
        whole, local = order_of_scan(self.modules.calls, b, e, l)
        B, C = (self.cut(M, 0, batched=False) if M.ndim == 2 else self.cut(M) for M in (B, C))
        scan = Scan(
            name,
            index,
            self.cut(u, 1),
            delta,
            self.cut(A, 0, False),
            B,
            C,
            self.cut(D, 0, False),
            self.cut(z, 1),
            self.cut(y, 1),
            self.cut(initial_state, 1),
            self.cut(seq_idx),
            torch.arange(e) if self.channels is None else self.channels,
            e,
            l,
            conv=self.convolution(e, l),
            mixture=self.mixture(b, l),
            **more,
        )
        if whole is not None:
            scan.directions, scan.extra, scan.indices = whole.directions, whole.extra, self.rows_of(whole.tokens)
        if self.positions is not None:
            scan = at_positions(scan, self.positions)
        self.ungated = scan, local
        self.keep(scan)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The kept rows of a batch of token indices."""
        return tokens[: self.rows] if tokens.ndim == 3 else tokens

    def mixture(self, b: int, l: int) -> Tensor | None:
        """(b l m) the mixtures of tokens that the scan at work reads."""
        for call in reversed(self.modules.calls):
            weights = call.notes.get("mixture")
            if weights is not None and weights.shape[:2] == (b, l):
                return self.cut(weights)
        return None

    def convolution(self, e: int, l: int) -> Convolution | None:
        """The one in front of this scan; Mamba-2 convolves B and C as well, behind the channels of u."""
        conv = self.notes.pop("convolution", None)
        if conv is None or conv.x.shape[1] < e or conv.x.shape[2] != l or self.positions is not None:
            return None
        bias = None if conv.bias is None else self.cut(conv.bias[:e], 0, False)
        return Convolution(self.cut(conv.x[:, :e], 1), self.cut(conv.weight[:e], 0, False), bias)

    def gate(self, z: Tensor) -> None:
        """A SiLU was taken: the first one that the layer of the scan recorded last takes behind it is its gate's."""
        if self.ungated is None or self.ungated[0].name not in (self.name, self.modules.caller.name):
            return
        (scan, order), self.ungated = self.ungated, None
        e, l = scan.total // scan.directions, scan.length
        if z.ndim < 3 or z[0].numel() != e * l:
            return
        z = (z if self.keep_graph else z.detach())[: len(scan.u)].reshape(-1, l, e).transpose(1, 2)  # (b e l)
        z = z[:, (scan.channels % e).to(z.device)]
        if order is not None and not order.extra:  # a gate stands at the tokens that came to the layer
            at = scan.by_channel(self.rows_of(order.tokens))  # (e l) or (b e l)
            z = z.gather(2, at.expand(*z.shape[:2], -1))
        elif scan.positions is not None:
            z = z[..., scan.positions]
        scan.gate = z.contiguous()

    def keep(self, scan: Scan | DenseScan | Attention) -> None:
        self.found.append(scan)
        held = self.found.bytes()
        if held > self.max_bytes:
            self.found.clear()
            raise ValueError(
                f"the tap would hold {held:,} bytes, more than max_bytes = {self.max_bytes:,}: choose "
                f"layers=, channels=, positions= or rows=, shorten the input, or raise max_bytes"
            )


def at_positions(scan: Scan, positions: list[int]) -> Scan:
    """The scan with nothing but the steps `positions` and the states behind them."""
    at = step_numbers(scan, positions, scan.u.device)
    kept = scan.recurrence(at.tolist())
    cut = {
        name: None if (t := getattr(scan, name)) is None else t[..., at]
        for name in ("u", "delta", "z", "y", "seq_idx", "weight", "own")
    }
    B, C = (M if M.ndim == 2 else M[..., at] for M in (scan.B, scan.C))
    return replace(scan, B=B, C=C, **cut, kept=kept, positions=at, conv=None)


def without_scans(model: nn.Module) -> str:
    """Which probes a model without scans still has."""
    image = any(isinstance(m, nn.Conv2d) for m in model.modules())
    names = "relevance, receptive_field" if image else "relevance, memory, recall (for language models)"
    return (
        f"the probes {names}, hidden_attention (where there is attention) and token_dynamics (its norms over depth) "
        f"need none and still apply"
    )
