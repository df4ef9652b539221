"""One GGUF file for llama.cpp (Mamba, Falcon-Mamba and Mamba-2), in float32 or smaller (--type)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor

from ssmzoo.data.text_tokenizer import ByteTokenizer, Tokenizer
from ssmzoo.inference.export.language import is_tied, mixers, norm_eps, why_no_mamba, why_not_transformers
from ssmzoo.inference.export.source import Source, family_of_class
from ssmzoo.inference.export.tokenizer import fast_tokenizer, special_tokens
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.released.gguf import BLOCK

CONTEXT = 2**20  # a recurrent model has no limit; llama.cpp's converter writes this one
# what a file of a type holds as that type: the large matrices; the others, and widths that do not fit, are float32
LARGE = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight")
TYPES = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
}  # gguf's name, llama.cpp's number


def refuse(source: Source) -> str | None:
    if reason := why_no_mamba(source, "MODEL_TYPE") or why_not_transformers(source.model):
        return reason
    first = mixers(source.model)[0]
    if first.d_inner != 2 * first.d_model:
        return f"llama.cpp takes an inner width of 2 d_model only, this model's is {first.d_inner} of {first.d_model}"
    if first.in_proj.bias is not None or first.conv1d.bias is None:
        return "llama.cpp has no biases of the projections, and needs that of the convolution"
    if isinstance(first, Mamba2) and first.dt_limit != (0.0, float("inf")):
        return f"llama.cpp has no limits of the time step, this model's are {first.dt_limit}"
    if importlib.util.find_spec("gguf") is None:
        return "gguf is not installed (pip install gguf)"
    return None


def write(source: Source, folder: Path, type: str = "f32") -> None:
    """type: one of TYPES, of the large matrices"""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    model, first = source.model, mixers(source.model)[0]
    two = isinstance(first, Mamba2)
    writer = GGUFWriter(folder / "model.gguf", "mamba2" if two else "mamba")
    writer.add_name(source.name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(first.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(model.backbone.layers))
    writer.add_layer_norm_rms_eps(norm_eps(model))
    writer.add_ssm_conv_kernel(first.d_conv)
    writer.add_ssm_inner_size(first.d_inner)
    writer.add_ssm_state_size(first.d_state)
    writer.add_ssm_time_step_rank(first.nheads if two else first.dt_rank)
    if two:
        writer.add_ssm_group_count(first.ngroups)
    else:
        writer.add_ssm_dt_b_c_rms(family_of_class(source.cls) == "falcon_mamba")
    wanted, number = TYPES[type]
    writer.add_file_type(number)
    if number not in (0, 1):
        writer.add_quantization_version(2)
    add_tokenizer(writer, source.tokenizer, len(model.lm_head.weight))
    for name, tensor in tensors(source).items():
        kind = GGMLQuantizationType[wanted if name.endswith(LARGE) and tensor.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(name, quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(source: Source) -> dict[str, Tensor]:
    """llama.cpp's names and forms: A itself in place of its logarithm, no unit axes, one row per group in the norm."""
    model, state = source.model, source.model.state_dict()
    found = {
        "token_embd.weight": state["backbone.embedding.weight"],
        "output_norm.weight": state["backbone.norm_f.weight"],
    }
    if not is_tied(model):
        found["output.weight"] = state["lm_head.weight"]
    for i, block in enumerate(model.backbone.layers):
        for ours, theirs in BLOCK.items():
            tensor = state.get(f"backbone.layers.{i}.{ours}")
            if tensor is None:
                continue
            if ours == "mixer.A_log":
                tensor = -tensor.exp()
            if ours == "mixer.conv1d.weight":
                tensor = tensor.squeeze(1)
            if isinstance(block.mixer, Mamba2) and ours in ("mixer.A_log", "mixer.D"):
                tensor = tensor[:, None]
            if ours == "mixer.norm.weight":
                tensor = tensor.unflatten(0, (block.mixer.ngroups, -1))
            found[f"blk.{i}.{theirs}"] = tensor
    return found


def add_tokenizer(writer, tokenizer: Tokenizer | None, rows: int) -> None:
    """The vocabulary, with as many tokens as the embedding has rows; without a tokenizer they are called <0>, <1>, ...:
    llama.cpp and its clients stop at a file without one."""
    from gguf import TokenType

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    if tokenizer is None:
        writer.add_token_list([f"<{i}>" for i in range(rows)])
        writer.add_token_merges(["< 0"])
        return
    fast = fast_tokenizer(tokenizer)
    special = {number for number, token in fast.get_added_tokens_decoder().items() if token.special}
    tokens = [fast.id_to_token(i) for i in range(rows)]
    writer.add_token_list([f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)])
    kinds = [
        TokenType.UNUSED if token is None else TokenType.CONTROL if i in special else TokenType.NORMAL
        for i, token in enumerate(tokens)
    ]
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(fast))
    for name, number in special_tokens(tokenizer).items():
        if number is not None:
            getattr(writer, f"add_{name}")(number)
    writer.add_add_bos_token(False)


def _merges(fast) -> list[str]:
    import json

    merges = json.loads(fast.to_str())["model"].get("merges", [])
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def usage(source: Source) -> str:
    if source.tokenizer is None:
        return "Ids go into llama.cpp and come out of it: the file has no words, token 7 is called <7>."
    note = " Its vocabulary is bytes: llama.cpp splits text as GPT-2 does, which changes nothing for single bytes."
    return (
        "`llama-cli -m model.gguf -p ...` of llama.cpp; large matrices are of the type asked for, float32 by default."
        + (note if isinstance(source.tokenizer, ByteTokenizer) else "")
    )
