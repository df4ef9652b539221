"""MambaTalk as released: VQVAEConvZero (stage 1) and MambaTalk (stage 2).

Our names are theirs, but for a self attention of the face that the released stage 2 computes and never uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.models.mambatalk import MambaTalk, attention
from ssmzoo.models.motion_vqvae import MotionVQVAE
from ssmzoo.released.arguments import Arguments

MODELS = (MambaTalk, MotionVQVAE)
TELLING_KEYS = r"^(global_scan\.learnable_query|quantizer\.embedding\.weight)$"
UNUSED = "global_scan.face_q_self_attn."

# fields of the runner's arguments, without defaults there; None: the tensors tell
STAGE_1 = dict.fromkeys(("vae_layer", "vae_length", "vae_test_dim", "vae_codebook_size"))
OF_STAGE_1 = {"vae_quantizer_lambda": (None, "weighs a loss of stage 1"), "vae_layer": (None, "of stage 1")}
VQ = Arguments("VQVAEConvZero", STAGE_1, required=("vae_quantizer_lambda",))
TALK = Arguments(
    "MambaTalk",
    dict.fromkeys(("pose_length", "hidden_size", "audio_f", "motion_f", "vae_codebook_size")),
    OF_STAGE_1
    | {
        "vae_length": (None, "of stage 1"),
        "pose_dims": (None, "not read there: the motion has vae_test_dim channels"),
        "t_fix_pre": (None, "keeps the table of words from training"),
        "vae_test_dim": (None, "the learnt query has as many channels"),
    },
)
TABLES = (TALK, VQ)


def official(state: dict[str, Tensor], **given):
    """VQVAEConvZero where the checkpoint has a code book, MambaTalk otherwise."""
    if "quantizer.embedding.weight" in state:
        c = VQ.complete(given)
        sizes = (c["vae_test_dim"], c["vae_length"], c["vae_layer"], c["vae_codebook_size"], c["vae_quantizer_lambda"])
        return _OfficialVQVAE(*sizes), state
    c = TALK.complete(given)
    model = _OfficialMambaTalk(
        state["global_scan.learnable_query"].shape[-1],
        c["pose_length"],
        c["hidden_size"],
        c["audio_f"],
        c["motion_f"],
        c["vae_codebook_size"],
        len(state["text_pre_encoder_face.weight"]),
        len(state["speaker_encoder_face.weight"]),
    )
    return model, from_official(model, state)


def from_official(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(UNUSED)}


def to_official(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the unused attention as it is made, which the official class insists on."""
    found = dict(state)
    if "speaker_encoder_face.weight" in found:
        like = found["speaker_encoder_face.weight"]
        with torch.random.fork_rng(devices=[]):
            made = attention(like.shape[1], 4, 0.0).to(like)
        found |= {f"{UNUSED}{key}": value for key, value in made.state_dict().items()}
    return found


def infer(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    if "quantizer.embedding.weight" in state:
        codes, width = state["quantizer.embedding.weight"].shape
        layers = sum(key.endswith("model.0.weight") and key.startswith("encoder") for key in state)
        channels = state["encoder.main.0.weight"].shape[1]
        return {"vae_codebook_size": codes, "vae_length": width, "vae_layer": layers, "vae_test_dim": channels}
    if "global_scan.learnable_query" not in state:
        return {}
    return {
        "pose_length": state["global_scan.position_embeddings.pe"].shape[1] // 2,
        "hidden_size": state["speaker_encoder_face.weight"].shape[1],
        "audio_f": len(state["text_encoder_face.weight"]),
        "motion_f": len(state["global_scan.motion_proj2.weight"].T),
        "vae_codebook_size": len(state["local_scan.motion_down_face.weight"]),
    }


class _OfficialVQVAE(MotionVQVAE):
    """Official call: x (b l c) -> (rec_pose, poses_feat, embedding_loss, index as float)."""

    def forward(self, x: Tensor):
        out = super().forward(x)
        return out.motion, out.latent, out.loss.reshape(1), out.code.to(x.dtype)


class _OfficialMambaTalk(MambaTalk):
    """Official call, with its outputs in its order."""

    def forward(self, in_audio: Tensor, in_word: Tensor, mask: Tensor, in_motion: Tensor, in_id: Tensor):
        out = super().forward(in_audio, in_word, in_motion, mask, in_id.squeeze(-1))
        return tuple(values[part] for values in out for part in ("face", "upper", "lower", "hands"))
