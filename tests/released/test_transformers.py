"""Folders that Hugging Face transformers saves load without an argument and compute what transformers computes."""

import pytest
import torch

import ssmzoo
from ssmzoo._torchvision import make_importable

make_importable()  # transformers imports torchvision where it is installed
transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
TWO = dict(num_heads=4, head_dim=16, state_size=16, chunk_size=8)
CONFIGS = [
    ("MambaForCausalLM", "MambaConfig", dict(state_size=8)),
    ("MambaForCausalLM", "MambaConfig", dict(tie_word_embeddings=False, use_bias=True)),
    ("MambaModel", "MambaConfig", {}),
    ("FalconMambaForCausalLM", "FalconMambaConfig", dict(state_size=8)),
    ("Mamba2ForCausalLM", "Mamba2Config", TWO | dict(n_groups=1)),
    ("Mamba2ForCausalLM", "Mamba2Config", TWO | dict(n_groups=1, tie_word_embeddings=True)),
    ("Mamba2Model", "Mamba2Config", TWO | dict(n_groups=2)),
]


@pytest.mark.parametrize("cls, config, given", CONFIGS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CONFIGS)])
def test_saved_folders_compute_the_same(cls, config, given, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(transformers, cls)(getattr(transformers, config)(**SMALL, **given)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(97, (2, 13))
    with torch.no_grad():
        expected, got = theirs(ids), ssmzoo.load_official(tmp_path)(ids)
    expected = expected.logits if "logits" in expected else expected.last_hidden_state
    got = got.logits if hasattr(got, "logits") else got
    assert (got - expected).norm() < 1e-5 * expected.norm()
