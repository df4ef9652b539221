"""torch.export with a batch from 1 on, torch.jit.trace and operation counts of every image and restoration model."""

import pytest
import tiny_images
import torch

MODELS = tiny_images.tiny_models()


def other_batches(model, x):
    for size in (1, 3, 17):
        batch = torch.rand(size, *x.shape[1:])
        yield batch, model(batch)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_export_takes_any_batch(name):
    model, x = tiny_images.build(MODELS[name])
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for batch, expected in other_batches(model, x):
        torch.testing.assert_close(program(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_trace_takes_any_batch(name):
    model, x = tiny_images.build(MODELS[name])
    traced = torch.jit.trace(model, x, check_trace=False)
    for batch, expected in other_batches(model, x):
        torch.testing.assert_close(traced(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_operations_are_counted_by_torch(name):
    """torch's own counter sees the products of matrices and the convolutions of every Linear and Conv2d."""
    from torch.utils.flop_counter import FlopCounterMode

    model, x = tiny_images.build(MODELS[name])
    with FlopCounterMode(display=False) as counter:
        model(x)
    largest = max(m.weight.numel() for m in model.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d))
    assert counter.get_total_flops() > 2 * largest
