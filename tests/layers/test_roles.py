"""What a parameter is, over every registered model."""

import inspect

import pytest
import torch
from torch import nn

import ssmzoo
from ssmzoo.layers.roles import in_head, named_role
from ssmzoo.presets import build_model, model_class, read_model_config
from ssmzoo.released.fit import role as role_in
from ssmzoo.train.optim import parameter_roles

NODES = {}
KNOWN = {"img_size": 64, "level": "graph", "node_vocab": None, "edge_vocab": None}  # not 3
for model_name in ssmzoo.list_models():
    found = read_model_config(model_name)["model"]
    unknown = [k for k, v in found.items() if str(v).startswith("${")]  # what only the data knows
    sizes = {k: KNOWN.get(k, 3) for k in unknown}
    NODES.setdefault(model_class(found["_target_"]), found | sizes)


@pytest.mark.parametrize("cls", NODES, ids=lambda c: c.__name__)
def test_state_space_parameters_norms_biases_and_embeddings_do_not_decay(cls):
    with torch.device("meta"):
        model = build_model(NODES[cls])
    roles = parameter_roles(model)
    assert set(roles) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    decays = {name for name, role in roles.items() if role == "decay"}
    assert decays and all(model.get_parameter(name).ndim > 1 for name in decays)
    for name in decays:
        assert not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        assert named_role(name) is None and not name.endswith((".bias", "A_log", "pos_embed"))


def sized(cls) -> str | None:
    """The argument that sets how many outputs a model has."""
    return next((k for k in ("num_classes", "vocab_size") if k in inspect.signature(cls).parameters), None)


OWN_NAMES = {"RNNModel", "ComplexDiagonalModel"}  # heads under the names of their checkpoints, which others use inside


@pytest.mark.parametrize("cls", [c for c in NODES if sized(c)], ids=lambda c: c.__name__)
def test_what_grows_with_the_number_of_outputs_is_head_or_embedding(cls):
    with torch.device("meta"):
        small, large = (build_model(NODES[cls] | {sized(cls): n}) for n in (24, 48))
    there = large.state_dict()
    grown = {k for k, v in small.state_dict().items() if v.shape != there[k].shape}
    found = {role_in(small, name) for name in grown}
    assert found == {""} if cls.__name__ in OWN_NAMES else "head" in found <= {"head", "embedding"}


@pytest.mark.parametrize(
    "name, role",
    [
        ("layers.0.mixer.A_log", "A_log"),
        ("A_b_log", "A_log"),
        ("A_logs", "A_log"),
        ("mixer.D_b", "D"),
        ("Ds", "D"),
        ("D", "D"),
        ("dt_projs_bias", "bias"),
        ("pos_embed_cls", "position"),
        ("absolute_pos_embed", "position"),
        ("cls_token_head", "class token"),
        ("attn.relative_position_bias_table", "relative position"),
        ("Delta", None),
        ("D_matrix", None),
        ("in_proj.weight", None),
    ],
)
def test_names_that_say_their_role(name, role):
    assert named_role(name) == role


@pytest.mark.parametrize("path", ["head", "lm_head", "readout.2", "classifier.head", "model.head"])
def test_modules_of_a_head(path):
    assert in_head(path) and not in_head(f"blocks.{path}_norm")
