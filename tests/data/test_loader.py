"""The one loader: workers that stay, epochs that go on, data sets that other processes can be sent."""

import os
import pickle

import pytest
import torch

from ssmzoo.data.formal import FormalData
from ssmzoo.data.images import ImageData
from ssmzoo.data.loader import ResumableLoader
from ssmzoo.data.photos import PhotoData


class WhoLoads(torch.utils.data.Dataset):
    """(index, epoch, process that loaded it)"""

    def __len__(self):
        return 7

    def __getitem__(self, draw):
        return torch.tensor([draw.index, draw.epoch, os.getpid()])


def test_workers_stay_from_epoch_to_epoch_until_training_ends():
    loader, plain = (ResumableLoader(WhoLoads(), 2, shuffle=True, num_workers=n) for n in (1, 0))
    epochs = [torch.cat(list(loader)) for _ in range(3)]
    assert torch.equal(torch.cat(epochs)[:, :2], torch.cat([*plain, *plain, *plain])[:, :2])
    assert [sorted(e[:, 0].tolist()) for e in epochs] == [list(range(7))] * 3
    assert len({pid for e in epochs for pid in e[:, 2].tolist()} - {os.getpid()}) == 1
    loader._iterator = None  # Lightning, at the end of fit
    with pytest.raises(ProcessLookupError):
        os.kill(int(epochs[0][0, 2]), 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loop_that_leaves_early_goes_on_where_it_left(num_workers):
    loader = ResumableLoader(WhoLoads(), 2, shuffle=True, num_workers=num_workers)
    first = [next(iter(loader))[:, 0] for _ in range(3)]
    assert loader.state_dict() == {"epoch": 0, "position": 3}
    rest = [batch[:, 0] for batch in loader]
    assert sorted(torch.cat(first + rest).tolist()) == list(range(7))
    loader.load_state_dict({"epoch": 0, "position": 2})
    assert torch.equal(next(iter(loader))[:, 0], first[2])


@pytest.mark.parametrize("data", [ImageData, PhotoData, FormalData])
def test_waiting_for_batches_is_counted(data):
    prepared = data()
    prepared.setup("fit")
    loader = prepared.train_dataloader()
    next(iter(loader))
    assert loader.waited > 0


@pytest.mark.parametrize("data", [ImageData, PhotoData])
def test_workers_that_are_not_forked_can_be_sent_the_data(data):
    prepared = data()
    prepared.setup()
    for loader in (prepared.train_dataloader(), prepared.val_dataloader()):
        sent = pickle.loads(pickle.dumps(loader.dataset))
        draw = next(loader._epoch(0, 0))[0]
        for key, value in sent[draw].items():
            assert torch.equal(value, loader.dataset[draw][key]) if torch.is_tensor(value) else True
