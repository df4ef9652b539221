"""torch.func on models: forward mode equals reverse mode, gradients per sample equal a loop. Every model class."""

import pytest
import test_mambair as restoration
import test_vision_models as vision
import torch
from test_state_contract import NODES, VOCAB, tiny_node
from torch.func import functional_call, grad, jvp, vmap

import ssmzoo
from ssmzoo.models.anomaly_transformer import AnomalyTransformer
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.edsr import EDSR
from ssmzoo.models.maat import MAAT
from ssmzoo.models.mamba_fscil import MambaFSCIL
from ssmzoo.models.mamba_vision import MambaVision
from ssmzoo.models.mambair import MambaIR
from ssmzoo.models.mambair_unet import MambaIRUNet
from ssmzoo.models.mambair_v2 import MambaIRv2
from ssmzoo.models.mambaout import MambaOut
from ssmzoo.models.swinir import SwinIR
from ssmzoo.models.token_dynamics import ReorderedMamba
from ssmzoo.models.vit import ViT
from ssmzoo.presets import build_model, model_class, read_model_config

SAMPLES = 2
SERIES = {"d_model": 8, "n_heads": 2, "e_layers": 2, "d_ff": 8}
MORE = {  # beyond the language models of the state contract and the classifiers of the vision tests
    "transformer of experts": lambda: TransformerLM(VOCAB, 16, 2, n_heads=2),
    "vit": lambda: ViT(num_classes=3, img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2),
    "fscil": lambda: MambaFSCIL(num_classes=4, img_size=32, in_chans=3),
    "reorder": lambda: ReorderedMamba(num_classes=5, img_size=32, patch_size=16, embed_dim=16, depth=2, d_state=2),
    "mamba_vision": lambda: MambaVision(
        num_classes=5, depths=(1, 1, 2, 2), embed_dim=8, stem_dim=4, num_heads=2, window_size=2, mixer={"d_state": 2}
    ),
    "mambair": lambda: MambaIR(2, **restoration.TINY),
    "mambair_v2": lambda: MambaIRv2(2, **restoration.TINY_V2),
    "swinir": lambda: SwinIR(2, **restoration.TINY_SWIN),
    "edsr": lambda: EDSR(2, embed_dim=8, depth=2),
    "mambaout": lambda: MambaOut(num_classes=5, depths=(1, 1, 1, 1), dims=8),
    "maat": lambda: MAAT(3, **SERIES),
    "anomaly_transformer": lambda: AnomalyTransformer(3, **SERIES),
    "unet": lambda: MambaIRUNet(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, d_state=2, squeeze_factor=4),
}
JRT = tiny_node("jrt_rnn")  # reads its prefix in both directions
MORE["jrt_rnn"] = lambda: build_model(JRT)
MODELS = {name: lambda node=node: build_model(node) for name, node in NODES.items()} | vision.SMALL | MORE


def make(name):
    """The model, a batch for it, and out(parameters, inputs), its first result."""
    torch.manual_seed(0)
    dtype = torch.float32 if name == "unet" else torch.float64  # whose convolution vmap cannot differentiate
    model = MODELS[name]().to(dtype).eval()
    ids = name in NODES or name == "jrt_rnn" or isinstance(model, TransformerLM)
    side = 8 if name in ("mambair", "mambair_v2", "swinir", "edsr", "unet") else 32
    x = torch.randint(VOCAB, (SAMPLES, 6)) if ids else torch.randn(SAMPLES, 3, side, side, dtype=dtype)
    x = torch.randn(SAMPLES, 10, 3, dtype=dtype) if isinstance(model, (MAAT, AnomalyTransformer)) else x

    def out(parameters, x):
        y = functional_call(model, parameters, (x,))
        y = getattr(y, "logits", y)
        return y[0] if isinstance(y, tuple) else y

    return model, x, out


def close(got, expected):
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-4
    assert (got - expected).norm() <= tolerance * (1 + expected.norm())


def test_every_model_class_is_here():
    names = set(ssmzoo.list_models()) - set(ssmzoo.list_models(task="graphs"))  # no samples: test_graph_mamba.py
    # dictionaries and five tensors: test_mambatalk.py; a frozen model with memories: adapt/test_ssmi.py
    for task in ("motion_codes", "speech_motion", "questions"):
        names -= set(ssmzoo.list_models(task=task))
    registered = {model_class(read_model_config(name)["model"]["_target_"]) for name in names}
    assert registered == {type(MODELS[name]()) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_equals_reverse_mode(name):
    model, x, out = make(name)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    y, dy = jvp(lambda p: out(p, x), (parameters,), (tangents,))
    weights = torch.randn_like(y)
    (out(dict(model.named_parameters()), x) * weights).sum().backward()
    right = sum((p.grad * tangents[n]).sum() for n, p in model.named_parameters() if p.grad is not None)
    close((dy * weights).sum(), right)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample(name):
    model, x, out = make(name)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    weights = torch.randn_like(out(parameters, x))

    def loss(parameters, x, weights):
        return (out(parameters, x[None]) * weights[None]).sum()

    got = vmap(grad(loss), (None, 0, 0))(parameters, x, weights)
    for i in range(SAMPLES):
        model.zero_grad()
        loss(dict(model.named_parameters()), x[i], weights[i]).backward()
        for n, p in model.named_parameters():
            close(got[n][i], torch.zeros_like(p) if p.grad is None else p.grad)
