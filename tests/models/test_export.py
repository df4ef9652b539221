"""torch.export: one program for every batch and length, with the model's gradients."""

import pytest
import torch
from test_state_contract import NODES, VOCAB
from torch.export import Dim, export
from walker import form

from ssmzoo.presets import build_model

ONE_LENGTH = {  # exported for one length and any batch; export itself refuses to promise more
    "RNNModel": "torch's recurrent kernels are traced for one length",
    "BasedLM": "its Taylor attention in torch's functions is cut into as many chunks as the example has",
    "HydraLM": "its workspace turns as often as the example has chunks",
    "Mamba3LM": "its scan in torch's functions is cut into as many chunks as the example has",
}


def build(name):
    """The model of one layer, where its layers are all alike: two of them trace the same twice."""
    model, node = build_model(NODES[name]), NODES[name]
    layers = next((m for m in model.children() if isinstance(m, torch.nn.ModuleList)), ())
    layers = layers or getattr(getattr(model, "backbone", None), "layers", ())
    count = next((key for key in ("n_layer", "n_blocks") if key in node), None)
    if count and len({form(layer) for layer in layers}) == 1:
        model = build_model(node | {count: 1})
    return model.eval()


def one_length(model, shapes) -> None:
    ids = torch.randint(VOCAB, (2, 12))
    with pytest.raises(Exception, match="length|specializ|Constraints"):
        export(model, (ids,), dynamic_shapes=shapes, strict=False)
    program = export(model, (ids,), strict=False).module()
    other = torch.randint(VOCAB, (2, 12))
    torch.testing.assert_close(program(other).logits, model(other).logits)


@pytest.mark.parametrize("name", NODES)
def test_one_program_serves_every_length(name):
    kind = NODES[name]["_target_"].rpartition(".")[2]
    torch.manual_seed(0)
    model = build(name)
    shapes = {"input_ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=4, max=4096)}}
    if kind in ONE_LENGTH:
        return one_length(model, shapes)
    program = export(model, (torch.randint(VOCAB, (2, 12)),), dynamic_shapes=shapes, strict=False).module()
    for batch, length in ((3, 5), (1, 33), (2, 130)):
        ids = torch.randint(VOCAB, (batch, length))
        torch.testing.assert_close(program(ids).logits, model(ids).logits)
    model(ids).logits.square().sum().backward()
    program(ids).logits.square().sum().backward()
    right = dict(model.named_parameters())
    assert sum(p.grad is not None for p in program.parameters()) > 0
    for key, parameter in program.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, right[key].grad)
