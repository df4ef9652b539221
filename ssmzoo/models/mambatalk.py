"""MambaTalk, stage 2 (NeurIPS 2024, arXiv 2403.09471): speech, text, speaker and seed motion -> codes of four parts.

    fused = p_text * text + p_audio * audio       softmax of a Linear([text; audio]), for face and body
    global scan   b = encoder(motion, masked values replaced by a learnt query)
                  g = attention(proj(b) + attention(speaker) + sinusoid)
                  features = Linear([Scan(fused face), Scan(b)])
    local scan    G = g + decoder(g + sinusoid, memory = fused body);  U, H, L = MLPs(G)
                  face = Scan_4([speaker + sinusoid; features])
                  upper = Model([U'; H + L]), hands = Model([H'; U + L]), lower = Model([L'; U + H])
                  rec = Linear(part), close to the latent of stage 1;  cls = MLP(rec), logits of its codes

X' = X + speaker + sinusoid; Model is a layer of attention before a Mamba block (mambatalk_layers/scan.py).
Where the code differs from the paper it is followed: the face sees speech through the global features only, and the
query of the cross attention has no speaker. A self attention of the face that the released code computes and never
uses is left out (released/mambatalk.py).

Source: project MambaTalk @b3c30e4 (Apache-2.0), models/mambatalk.py; parameter names are theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.motion.conv import SLOPE, MotionEncoder
from ssmzoo.models.mambatalk_layers.audio import AudioEncoder
from ssmzoo.models.mambatalk_layers.scan import MIXERS, Scan
from ssmzoo.models.motion_vqvae import MotionCodes
from ssmzoo.suggest import nearest

PARTS = ("face", "upper", "hands", "lower")
BODY = PARTS[1:]


class TalkOutput(NamedTuple):
    """rec {part: (b n K)} latents, cls {part: (b n K)} logits of the codes."""

    rec: dict[str, Tensor]
    cls: dict[str, Tensor]


class MLP(nn.Module):
    def __init__(self, d_in: int, d_hidden: int, d_out: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_in, d_hidden), nn.LeakyReLU(SLOPE), nn.Linear(d_hidden, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Sinusoid(nn.Module):
    """x (b l h) plus a table with a period of `period` frames, then dropout."""

    def __init__(self, d_model: int, period: int, dropout: float):
        super().__init__()
        rate = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        angle = torch.arange(period).float()[:, None] * rate
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]
        self.register_buffer("pe", table.repeat(2, 1)[None])
        self.period, self.dropout = period, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.arange(x.shape[1], device=x.device) % self.period
        return self.dropout(x + self.pe[:, frames])


def attention(d_model: int, n_heads: int, dropout: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(d_model, n_heads, d_model, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class GlobalScan(nn.Module):
    """-> global motion (b n h), features (b n h)."""

    def __init__(self, pose_dims: int, frames: int, h: int, a: int, f: int, dropout: float, mixer: str):
        super().__init__()
        self.learnable_query = nn.Parameter(torch.zeros(1, 1, pose_dims))
        self.motion_encoder = MotionEncoder(pose_dims, f, 3)
        self.motion_proj1, self.motion_proj2 = MLP(f, h, f), nn.Linear(f, h)
        self.position_embeddings = Sinusoid(h, frames, dropout)
        self.body_q_self_attn, self.motion_self_encoder = attention(h, 4, dropout), attention(h, 4, dropout)
        self.face_scan, self.body_scan = Scan(a, 2 * a, d_out=a, mixer=mixer), Scan(f, h, d_out=f, mixer=mixer)
        self.out = nn.Linear(a + f, h)

    def forward(self, motion: Tensor, mask: Tensor, face: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
        b = self.motion_encoder(torch.where(mask == 1, self.learnable_query, motion))
        g = self.motion_proj2(self.motion_proj1(b)) + self.body_q_self_attn(speaker)
        g = self.motion_self_encoder(self.position_embeddings(g))
        return g, self.out(torch.cat([self.face_scan(face), self.body_scan(b)], -1))


class LocalScan(nn.Module):
    """-> TalkOutput."""

    def __init__(
        self, frames: int, h: int, a: int, codes: int, dropout: float, mixer: str, n_layers: int, own_sound: bool
    ):
        super().__init__()
        self.own_sound = own_sound
        self.position_embeddings, self.body_proj = Sinusoid(h, frames, dropout), nn.Linear(a, h)
        layer = nn.TransformerDecoderLayer(h, 4, h, dropout, batch_first=True)
        self.motion_cross_attn = nn.TransformerDecoder(layer, n_layers)
        for part in PARTS:
            stack = {"n_layers": 4, "d_out": h} if part == "face" else {"attention": attention(h, 8, dropout)}
            self.add_module(f"{part}_scan", Scan(h, h, **stack, mixer=mixer))
            self.add_module(f"{part}_proj", nn.Linear(2 * h, h))
            self.add_module(f"motion_down_{part}", nn.Linear(h, codes))
            self.add_module(f"{part}_classifier", MLP(codes, h, codes))
        for part in BODY:
            self.add_module(f"motion2latent_{part}", MLP(h, h, h))

    def forward(self, g: Tensor, features: Tensor, body: Tensor, speakers: tuple[Tensor, Tensor]) -> TalkOutput:
        face_speaker, body_speaker = speakers
        body = self.body_proj(body)
        g = g + body if self.own_sound else g  # the memory has no positions: without it no frame knows its own sound
        g = g + self.motion_cross_attn(self.position_embeddings(g), body)
        x = {part: self._of("motion2latent_", part, g) for part in BODY}
        rest = sum(x.values())
        face = self.face_proj(torch.cat([self.position_embeddings(face_speaker), features], -1))
        rec = {"face": self.motion_down_face(self.face_scan(face))}
        for part in BODY:
            seen = self.position_embeddings(x[part] + body_speaker)
            y = getattr(self, f"{part}_proj")(torch.cat([seen, rest - x[part]], -1))
            rec[part] = self._of("motion_down_", part, getattr(self, f"{part}_scan")(y) + x[part])
        return TalkOutput(rec, {part: getattr(self, f"{part}_classifier")(v) for part, v in rec.items()})

    def _of(self, kind: str, part: str, x: Tensor) -> Tensor:
        return getattr(self, f"{kind}{part}")(x)


class MambaTalk(nn.Module):
    """audio (b samples 3), word (b n), motion (b n D), mask (b n D), speaker (b n) -> TalkOutput.

    pose_dims, frames   D, and n, the period of the sinusoids
    d_model, audio_dim, motion_dim   h, a, f
    codes               K, of every part's code book
    words, speakers     sizes of the two tables
    dropout             of attention and sinusoids
    mixer               mamba, or attention: the transformer twin (mambatalk_layers/scan.py)
    n_layers            of the cross attention
    own_sound           ours: every frame's query of the cross attention also has its own frame's sound. As released the
                        sound there has no positions, and what a body does cannot depend on when it is heard

    A mask of 1 hides a value of the motion; about 533 samples of sound belong to a frame.
    """

    def __init__(
        self,
        pose_dims: int = 337,
        frames: int = 64,
        d_model: int = 768,
        audio_dim: int = 512,
        motion_dim: int = 256,
        codes: int = 256,
        words: int = 11195,
        speakers: int = 25,
        dropout: float = 0.1,
        mixer: str = "mamba",
        n_layers: int = 8,
        own_sound: bool = False,
    ):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer is {mixer!r}{nearest(str(mixer), MIXERS)}; choose one of {', '.join(MIXERS)}")
        a = audio_dim
        for side, channels in (("face", 3), ("body", 2)):
            self.add_module(f"text_pre_encoder_{side}", nn.Embedding(words, 300))
            self.add_module(f"text_encoder_{side}", nn.Linear(300, a))
            self.add_module(f"audio_pre_encoder_{side}", AudioEncoder(channels, a))
            self.add_module(f"at_attn_{side}", nn.Linear(2 * a, 2 * a))
            self.add_module(f"speaker_encoder_{side}", nn.Embedding(speakers, d_model))
        self.global_scan = GlobalScan(pose_dims, frames, d_model, a, motion_dim, dropout, mixer)
        self.local_scan = LocalScan(frames, d_model, a, codes, dropout, mixer, n_layers, own_sound)

    def forward(self, audio: Tensor, word: Tensor, motion: Tensor, mask: Tensor, speaker: Tensor) -> TalkOutput:
        return self.move(self.hear(audio, word), motion, mask, speaker)

    @torch.no_grad()
    def start_at(self, motion: Tensor) -> None:
        """Before training, on many windows of motion (b n D): hidden values are the mean, which the encoder takes to
        zero; nothing, once the query has been trained."""
        g, mean = self.global_scan, motion.mean((0, 1))
        if not g.learnable_query.any():
            first = g.motion_encoder.main[0]
            g.learnable_query.copy_(mean)
            first.bias.copy_(-first.weight.sum(-1) @ mean)

    def hear(self, audio: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """Sound and text for face and body, (b n a) each."""
        frames = word.shape[1]
        face = self.fuse("face", self.audio_pre_encoder_face(audio, frames), word)
        return face, self.fuse("body", self.audio_pre_encoder_body(audio[..., :2], frames), word)

    def move(self, heard: tuple[Tensor, Tensor], motion: Tensor, mask: Tensor, speaker: Tensor) -> TalkOutput:
        """Of what was heard, which passes with different masks share."""
        face, body = heard
        speakers = self.speaker_encoder_face(speaker), self.speaker_encoder_body(speaker)
        g, features = self.global_scan(motion, mask, face, speakers[1])
        return self.local_scan(g, features, body, speakers)

    def fuse(self, side: str, audio: Tensor, word: Tensor) -> Tensor:
        """(b n a): text and audio, weighted channel by channel."""
        table, text, choose = (getattr(self, f"{n}_{side}") for n in ("text_pre_encoder", "text_encoder", "at_attn"))
        text = text(table(word))
        p = choose(torch.cat([text, audio], -1)).unflatten(-1, (-1, 2)).softmax(-1)
        return text * p[..., 1] + audio * p[..., 0]


class MambaTalkBody(nn.Module):
    """Both stages: MambaTalk with the code books it speaks in, which stand still.

    frames, d_model, audio_dim, motion_dim, words, dropout, mixer, own_sound   see `MambaTalk`
    codes          size and width of the code books: `rec` has as many channels as there are codes, and is compared
                   with latents
    n_layers, lower_layers   of the code books, see `MotionCodes`
    cross_layers   `n_layers` of MambaTalk

    forward as MambaTalk's.
    """

    def __init__(
        self,
        frames: int = 64,
        d_model: int = 768,
        audio_dim: int = 512,
        motion_dim: int = 256,
        words: int = 11195,
        dropout: float = 0.1,
        codes: int = 256,
        n_layers: int = 2,
        lower_layers: int = 4,
        mixer: str = "mamba",
        cross_layers: int = 8,
        own_sound: bool = False,
    ):
        super().__init__()
        self.codes = MotionCodes(codes, codes, n_layers, lower_layers).requires_grad_(False)
        sizes = (337, frames, d_model, audio_dim, motion_dim, codes, words)
        more = {"dropout": dropout, "mixer": mixer, "n_layers": cross_layers, "own_sound": own_sound}
        self.talk = MambaTalk(*sizes, **more)

    first_stage = "codes"  # a file that holds its weights alone fills this part (init_from)

    def forward(self, audio: Tensor, word: Tensor, motion: Tensor, mask: Tensor, speaker: Tensor) -> TalkOutput:
        return self.talk(audio, word, motion, mask, speaker)

    def train(self, mode: bool = True) -> MambaTalkBody:
        """The code books stay in evaluation."""
        super().train(mode)
        self.codes.eval()
        return self
