"""Graphs as data: digits, transfers, files, encodings, PyTorch Geometric by name, and graphs that are none."""

import math
import types

import numpy as np
import pytest
import torch

from ssmzoo.data.graphs import pyg as named
from ssmzoo.data.graphs.data import GraphData, TransferData
from ssmzoo.data.graphs.encodings import encode
from ssmzoo.data.graphs.sample import check_all, collate, undirected
from ssmzoo.data.graphs.sources import digit_graph, split
from ssmzoo.data.graphs.transfer import IGNORE, distance, transfer_graph


def path(n: int, **more) -> dict:
    edges = undirected(np.stack([np.arange(n - 1), np.arange(1, n)], axis=1))
    return {"x": torch.randn(n, 2), "edge_index": torch.from_numpy(edges), "y": torch.tensor([n % 2])} | more


def test_a_digit_is_its_inked_pixels_and_their_neighbours():
    levels = np.zeros((8, 8))
    levels[1, 1], levels[2, 2], levels[2, 3], levels[7, 7] = 1.0, 0.5, 0.25, 0.75
    graph = digit_graph(levels, 3)
    assert graph["x"][:, 0].tolist() == [1.0, 0.5, 0.25, 0.75]
    assert torch.allclose(graph["x"][2, 1:], torch.tensor([2 / 7, 3 / 7]))
    edges = {tuple(e): float(d) for e, d in zip(graph["edge_index"].T.tolist(), graph["edge_attr"].flatten())}
    diagonal = math.sqrt(2)
    assert edges.keys() == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert edges[0, 1] == pytest.approx(diagonal) and edges[1, 2] == 1 and graph["y"].tolist() == [3]
    assert len(digit_graph(np.zeros((8, 8)), 0)["x"]) == 1


def test_digits_are_split_once_and_told_apart_by_their_fingerprint():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = GraphData()
    assert data.sizes["node_dim"] == 3 and data.sizes["edge_dim"] == 1 and data.sizes["num_classes"] == 10
    about = data.describe()
    assert about["train_graphs"] + about["val_graphs"] == 1797
    assert GraphData().describe() == about != GraphData(split_seed=1).describe()
    batch = next(iter(data.train_dataloader()))
    assert batch["num_graphs"] == 32 and batch["batch"].max() == 31
    assert 0 < data.baselines()["the most frequent class"] < 0.2


@pytest.mark.parametrize("shape", ["ring", "tree"])
def test_the_answer_stands_at_the_source_and_is_asked_for_as_far_away_as_said(shape):
    for n in (17, 24):
        graph = transfer_graph(np.random.default_rng(n), shape, n, 5, distractors=1.0)
        x, (asked,) = graph["x"], (graph["y"] != IGNORE).nonzero(as_tuple=True)
        (source,), (target,) = (x[:, 5 + k].nonzero(as_tuple=True) for k in (0, 1))
        assert asked.tolist() == target.tolist() and x[source, :5].argmax() == graph["y"][target]
        assert x[target, :5].sum() == 0 and (x[:, :5].sum(1) == 1).sum() == len(x) - 1
        alone = transfer_graph(np.random.default_rng(n), shape, n, 5)["x"]
        assert alone[:, :5].sum() == 1 and alone[:, 5:].sum() == 2
        reached, steps = {int(source)}, 0
        while int(target) not in reached:
            steps += 1
            reached |= {int(j) for i, j in graph["edge_index"].T if int(i) in reached}
        assert steps == distance(shape, n)
        degree = torch.bincount(graph["edge_index"][0])
        assert set(degree.tolist()) == ({2} if shape == "ring" else {1, 2, 4})
        assert shape == "ring" or (degree[target], degree[source]) == (4, 1)


def test_training_sees_new_transfers_in_every_epoch_and_validation_always_the_same():
    data = TransferData(epoch_graphs=8, val_samples=4, batch_size=4, nodes=(8, 12))
    train, val = data.train_dataloader(), data.val_dataloader()
    first, second = ([b["x"] for b in train] for _ in range(2))
    assert len(first) == 2 and not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(val, data.val_dataloader()))
    again = data.train_dataloader()
    again.load_state_dict({"epoch": 1, "position": 1})
    assert torch.equal(next(iter(again))["x"], second[1])
    found = data.baselines()
    assert any("4 to 6 edges apart" in what and value == 0.2 for what, value in found.items())


def test_a_batch_is_the_disjoint_union():
    batch = collate([path(2), path(3, edge_label_index=torch.tensor([[0], [2]])) | {}][:1] + [path(4)])
    assert batch["batch"].tolist() == [0, 0, 1, 1, 1, 1] and batch["num_graphs"] == 2 and batch["y"].tolist() == [0, 0]
    assert batch["edge_index"].T.tolist() == [
        [0, 1],
        [1, 0],
        *([i + 2, j + 2] for i, j in path(4)["edge_index"].T.tolist()),
    ]
    pairs = collate([path(2, edge_label_index=torch.tensor([[0], [1]]))] * 2)
    assert pairs["edge_label_index"].tolist() == [[0, 2], [1, 3]]


def test_encodings_are_what_they_are_called():
    n = 6
    graph = encode(path(n), ["lap_pe", "rwse", "eig_centrality", "louvain"], max_freqs=8, walk_steps=4)
    A = torch.zeros(n, n, dtype=torch.float64)
    A[tuple(graph["edge_index"])] = 1
    laplacian = A.sum(1).diag() - A
    vectors, values = graph["EigVecs"].double(), graph["EigVals"][0, :, 0].double()
    assert vectors[:, n:].isnan().all() and values[n:].isnan().all() and values[0].abs() < 1e-6
    for k in range(n):  # eigenpairs, up to the sign
        assert torch.allclose(laplacian @ vectors[:, k], values[k] * vectors[:, k], atol=1e-5)
        assert values[k] == pytest.approx(2 - 2 * math.cos(math.pi * k / n), abs=1e-5)
    walk = A / A.sum(1, keepdim=True)
    expected = torch.stack([torch.linalg.matrix_power(walk, k).diagonal() for k in range(1, 5)], 1)
    assert torch.allclose(graph["pestat_RWSE"].double(), expected, atol=1e-6)
    central = graph["EigCentrality"].double()
    assert torch.allclose(A @ central, 2 * math.cos(math.pi / (n + 1)) * central, atol=1e-3)
    cluster = graph["LouvainCluster"]  # of a path: pieces of it
    assert 2 <= len(cluster.unique()) <= 3 and len(torch.unique_consecutive(cluster)) == len(cluster.unique())


def test_encodings_of_graphs_with_nothing_in_them_and_of_large_ones():
    names = ["lap_pe", "rwse", "eig_centrality", "louvain"]
    alone = {"x": torch.zeros(1, 1), "edge_index": torch.zeros(2, 0).long()}
    graph = encode(alone, names, max_freqs=2, walk_steps=2)
    assert (
        graph["EigVecs"][0, 0].abs() == 1
        and graph["EigVecs"][0, 1].isnan()
        and graph["pestat_RWSE"].tolist() == [[0, 0]]
    )
    large = encode(path(3100), ["lap_pe"], max_freqs=3)
    assert large["EigVals"][0, 1, 0] == pytest.approx(2 - 2 * math.cos(math.pi / 3100), rel=0.02, abs=1e-8)
    with pytest.raises(ValueError, match="data.encodings holds 'lap'; nearest: lap_pe"):
        encode(path(3), ["lap"])


# --- files of one's own


def arrays(**more) -> dict:
    """Three graphs of 2, 1 and 3 nodes."""
    return {
        "node_ptr": np.array([0, 2, 3, 6]),
        "edge_ptr": np.array([0, 2, 2, 6]),
        "x": np.arange(12, dtype=np.float32).reshape(6, 2),
        "edge_index": np.array([[0, 1, 0, 1, 1, 2], [1, 0, 1, 0, 2, 1]]),
        "edge_attr": np.ones((6, 1)),
        "y": np.array([0, 1, 1]),
    } | more


def written(tmp_path, **more) -> str:
    np.savez(tmp_path / "mine.npz", **{k: v for k, v in arrays(**more).items() if v is not None})
    return str(tmp_path / "mine.npz")


def test_a_file_of_ones_own_becomes_graphs(tmp_path, capsys):
    data = GraphData(dataset="file", path=written(tmp_path))
    source = data.source()
    by_size = {len(g["x"]): g for g in source.train + source.val}
    assert by_size[3]["edge_index"].tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]] and by_size[3]["x"][0].tolist() == [6, 7]
    assert data.sizes["num_classes"] == 2 and data.sizes["level"] == "graph" and data.sizes["edge_dim"] == 1
    assert "of 3 graphs 1 with no edges, 1 with a single node; they are kept" in capsys.readouterr().out
    nodes = GraphData(dataset="file", path=written(tmp_path, y=np.linspace(0, 1, 6), edge_attr=None))
    assert (nodes.sizes["level"], nodes.sizes["loss"], nodes.sizes["edge_dim"]) == ("node", "l1", 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"edge_index": np.full((2, 6), 3)}, "mine.npz, graph {}: edge_index names node 3, but the graph has"),
        ({"edge_index": np.full((2, 6), -1)}, "edge_index names node -1"),
        ({"edge_index": np.zeros((6, 2), int)}, "edge_ptr must ascend from 0 to 2"),
        ({"node_ptr": np.array([0, 2, 2, 6])}, "x has shape (0, 2); expected (nodes, features) with at least one node"),
        ({"node_ptr": np.array([0, 3, 2, 6])}, "node_ptr must ascend from 0 to 6, the length of x"),
        ({"y": np.zeros(4)}, "y has 4 rows; expected 3 (graphs) or 6 (nodes)"),
        ({"y": None}, "lacks the array y"),
        ({"x": np.full((6, 2), np.nan)}, "x holds NaN or infinity"),
        ({"edge_attr": np.full((6, 1), np.inf)}, "edge_attr holds NaN or infinity"),
    ],
)
def test_graphs_that_are_none_are_named_in_one_line(tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        GraphData(dataset="file", path=written(tmp_path, **change)).setup()
    said = str(error.value)
    assert "\n" not in said and any(words.format(g) in said for g in range(3)), said


def test_features_that_change_their_width_are_named():
    wide = path(3, x=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="mine, graph 1: x has 5 features a node, the first graph has 2"):
        check_all([path(3), wide], "mine")
    with pytest.raises(ValueError, match="mine, graph 1: edge_attr has 1 features an edge, the first graph has 0"):
        check_all([path(3), path(3, edge_attr=torch.ones(4, 1))], "mine")
    with pytest.raises(ValueError, match="mine holds no graphs"):
        check_all([], "mine")


def test_unusual_graphs_are_counted_and_kept():
    lonely = path(4, edge_index=torch.tensor([[0, 1], [1, 0]]))
    looped = path(2, edge_index=torch.tensor([[0, 0, 1], [0, 1, 0]]))
    empty, single = path(3, edge_index=torch.zeros(2, 0).long()), path(1)
    note = check_all([path(3), lonely, looped, empty, single], "mine")
    assert note == (
        "mine: of 5 graphs 1 with isolated nodes, 1 with self-loops, 2 with no edges, "
        "1 with a single node; they are kept"
    )
    assert check_all([path(3)], "mine") is None


@pytest.mark.parametrize("text", [b"", b"no archive", b"PK\x03\x04broken"])
def test_files_that_are_no_archives_are_refused_and_nothing_in_them_is_run(tmp_path, text):
    (tmp_path / "mine.npz").write_bytes(text)
    with pytest.raises(ValueError, match=r"is no \.npz file of arrays"):
        GraphData(dataset="file", path=str(tmp_path / "mine.npz")).setup()
    np.savez(tmp_path / "objects.npz", **(arrays() | {"y": np.array([{}, {}, {}], dtype=object)}))
    with pytest.raises(ValueError, match=r"is no \.npz file of arrays"):
        GraphData(dataset="file", path=str(tmp_path / "objects.npz")).setup()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"dataset": "digitz"}, "data.dataset = 'digitz'; choose digits or pyg/<name>"),
        ({"dataset": "pyg/Peptide-func"}, "nearest: Peptides-func"),
        ({"path": "/no/such/file.npz", "dataset": "file"}, "there is no such file"),
    ],
)
def test_sets_that_are_not_there(arguments, words):
    with pytest.raises(ValueError) as error:
        GraphData(**arguments).setup()
    assert words in str(error.value)


def test_a_single_graph_leaves_none_to_train_on():
    with pytest.raises(ValueError, match="1 graphs leave none to train on"):
        split([path(3)], 0.2, 0)


# --- PyTorch Geometric


class Item(types.SimpleNamespace):
    """As much of a Data as is read."""


def test_items_of_pytorch_geometric_become_graphs():
    edge = torch.tensor([[0, 1], [1, 0]])
    atoms = Item(x=torch.ones(2, 9).long(), edge_index=edge, edge_attr=torch.ones(2, 3).long(), y=torch.ones(1, 10))
    graph = named.sample(atoms, named.KNOWN["Peptides-func"])
    assert graph["x"].dtype == torch.long and graph["y"].shape == (1, 10)
    pixels = Item(
        x=torch.ones(2, 1), pos=torch.zeros(2, 2), edge_index=edge, edge_attr=torch.ones(2), y=torch.tensor([7])
    )
    graph = named.sample(pixels, named.KNOWN["MNIST"])
    assert graph["x"].shape == (2, 3) and graph["edge_attr"].shape == (2, 1) and graph["y"].tolist() == [7]
    superpixels = Item(x=torch.ones(2, 14), edge_index=edge, edge_attr=torch.ones(2, 2), y=torch.tensor([3, 20]))
    assert named.sample(superpixels, named.KNOWN["PascalVOC-SP"])["y"].tolist() == [3, 20]
    contact = Item(
        x=atoms.x,
        edge_index=edge,
        edge_attr=atoms.edge_attr,
        y=None,
        edge_label_index=edge,
        edge_label=torch.tensor([0, 1]),
    )
    graph = named.sample(contact, named.KNOWN["PCQM-Contact"])
    assert graph["y"].tolist() == [0, 1] and graph["edge_label_index"].shape == (2, 2)
    zinc = Item(x=torch.ones(2, 1).long(), edge_index=edge, edge_attr=torch.ones(2).long(), y=torch.tensor([0.5]))
    assert named.sample(zinc, named.KNOWN["ZINC"])["y"].tolist() == [[0.5]]


def test_a_set_is_asked_for_under_its_name_and_split(monkeypatch, tmp_path):
    datasets = pytest.importorskip(
        "torch_geometric.datasets", reason="PyTorch Geometric (extra `graph`) is not installed"
    )
    asked = []

    class Fake:
        def __new__(cls, **given):
            asked.append(given)
            edge = torch.tensor([[0, 1], [1, 0]])
            item = Item(
                x=torch.ones(2, 9).long(), edge_index=edge, edge_attr=torch.ones(2, 3).long(), y=torch.rand(1, 11)
            )
            return [item] * {"train": 4, "val": 2, "test": 3}[given["split"]]

    monkeypatch.setattr(datasets, "LRGBDataset", Fake)
    data = GraphData(dataset="pyg/Peptides-struct", path=str(tmp_path))
    assert data.sizes["num_classes"] == 11 and data.sizes["metric"] == "mae" and data.sizes["node_vocab"] == named.ATOMS
    assert [g["split"] for g in asked] == ["train", "val", "test"] and asked[0]["name"] == "Peptides-struct"
    assert asked[0]["root"].startswith(str(tmp_path)) and data.held_out() is not None


def test_what_pytorch_geometric_makes_up_can_be_trained_on():
    pytest.importorskip("torch_geometric.datasets", reason="PyTorch Geometric (extra `graph`) is not installed")
    data = GraphData(dataset="pyg/FakeDataset", encodings=["rwse"], walk_steps=3)
    batch = next(iter(data.val_dataloader()))
    assert batch["pestat_RWSE"].shape == (len(batch["x"]), 3)


def test_without_pytorch_geometric_its_sets_say_what_is_lacking(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *more, **kwargs):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return real(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="'pyg/ZINC' needs PyTorch Geometric: pip install torch_geometric"):
        GraphData(dataset="pyg/ZINC").setup()
