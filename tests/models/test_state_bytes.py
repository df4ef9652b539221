"""Every mixer of every sequence model tells the bytes of state that it carries."""

import pytest
import torch
from test_state_contract import NODES, VOCAB

from ssmzoo.layers.state import map_state, state_bytes
from ssmzoo.presets import build_model


def measured(state) -> int:
    found = []
    map_state(lambda t: found.append(t[0].numel() * t.element_size()), state)
    return sum(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_what_is_told_is_what_is_carried(name, dtype):
    model = build_model(NODES[name]).to(dtype).eval()
    for length in (1, 5, 12):
        with torch.no_grad():
            state = model(torch.randint(VOCAB, (2, length))).state
        assert state_bytes(model, length) == measured(state) > 0
