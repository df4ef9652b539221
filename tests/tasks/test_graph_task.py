"""Graphs from the command line: data and models train and are evaluated; losses and metrics by definition."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssmzoo.data.graphs.sample import collate
from ssmzoo.models.graph_mamba import GraphMamba
from ssmzoo.tasks.graphs import GraphLearning
from ssmzoo.tasks.metrics.graphs import average_precision, measure
from ssmzoo.tasks.micro_batch import split
from ssmzoo.tasks.objectives.graphs import LOSSES, answered

TINY = ["model.d_model=16", "model.n_layer=1", "trainer.max_steps=2", "trainer.val_check_interval=2", "name=a",
        "trainer.accelerator=cpu", "data.batch_size=4"]  # fmt: skip
TRANSFER = ["data=ring_transfer", "data.nodes=[6,9]", "data.val_samples=8", "data.epoch_graphs=16"]


def own_file(tmp_path, **more) -> str:
    """Twelve graphs of four nodes with two values each."""
    edges = np.tile(np.array([[0, 1, 2], [1, 2, 3]]), 12)
    found = {"node_ptr": np.arange(13) * 4, "edge_ptr": np.arange(13) * 3, "edge_index": edges}
    found |= {"x": np.random.default_rng(0).normal(size=(48, 3)), "y": np.random.default_rng(1).normal(size=(12, 2))}
    np.savez(tmp_path / "mine.npz", **(found | more))
    return str(tmp_path / "mine.npz")


@pytest.mark.parametrize("model", ["graph_mamba", "gps", "gated_gcn"])
def test_every_model_trains_and_is_evaluated_and_goes_on(call, tmp_path, model):
    status, out, err = call(f"model={model}", *TINY, *TRANSFER)
    assert (status, err) == (0, ""), err
    assert "validation accuracy" in out and "most frequent class of the graph" in out and "graphs/s" in out
    run = tmp_path / "runs" / model / "a"
    assert (run / "graphs.png").stat().st_size > 10_000 and "guessing" in (run / "report.md").read_text()
    status, out, _ = call(f"ckpt={run}", entry="eval")
    assert status == 0 and "validation accuracy" in out
    status, out, err = call(f"resume={run}", "trainer.max_steps=4")
    assert status == 0 and "steps" in out, err


def test_values_of_a_file_of_ones_own_and_encodings(call, tmp_path):
    file = own_file(tmp_path)
    more = [
        "data=graph_file",
        f"data.path={file}",
        "data.encodings=[lap_pe,rwse]",
        "data.max_freqs=3",
        "data.walk_steps=2",
    ]
    more += ["model.lap_pe={dim_pe: 4, max_freqs: 3}", "model.rwse={dim_pe: 4, steps: 2}", "model.order=random_walk"]
    status, out, err = call("model=graph_mamba", *TINY, *more)
    assert (status, err) == (0, ""), err
    assert "validation mae" in out and "mae, the median of the training graphs" in out


def test_digits_train(call, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    status, out, err = call("model=graph_mamba", *TINY, "model.buckets=3")
    assert (status, err) == (0, ""), err
    assert "linear classifier on pooled features, no edges" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["data.dataset=digitz"], "data.dataset = 'digitz'; choose digits"),
        (["data.encodings=[lap]"], "data.encodings holds 'lap'; nearest: lap_pe"),
        (["model.order=degre"], "order is 'degre'; nearest: degree"),
        (
            ["model.lap_pe={dim_pe: 4}"],
            "lap_pe needs EigVecs for every node; let the data compute it: data.encodings=[lap_pe]",
        ),
        (["task.loss=l1"], "task.loss is l1, but the data's answers are classes; choose cross_entropy"),
        (["task.metric=acuracy"], "task.metric is 'acuracy'; nearest: accuracy"),
        (["model.level=node"], "model.level is node, but the data asks about a graph"),
        (["data=ring_transfer", "data.shape=rink"], "data.shape is 'rink'; choose one of ring, tree"),
        (["data=ring_transfer", "data.nodes=[8,4]"], "data.nodes = [8, 4]"),
        (["data=graph_file"], "data.dataset = 'file'; choose digits or pyg/<name>, or give data.path=<file.npz>"),
        (["task=classification"], "task=classification is for images, GraphData has none; leave out task="),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(call, tmp_path, arguments, words):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    status, out, err = call("model=graph_mamba", *TINY, *arguments)
    assert status in (1, 2) and len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert words in err, err
    assert status == 1 or not list(tmp_path.iterdir())


def test_a_language_model_is_no_model_of_graphs(call):
    status, _, err = call("model=mamba", "data=ring_transfer", "model.vocab_size=8")
    assert status == 2 and "the task graphs needs a model of graphs" in err


def test_losses():
    y = torch.tensor([0, 0, 0, 2, -100])
    logits = torch.randn(5, 3)
    nats = -logits.log_softmax(-1)[range(4), y[:4]]
    assert torch.allclose(LOSSES["cross_entropy"](logits, y), nats.mean())
    weight = torch.tensor([0.25, 0.25, 0.25, 0.75])
    assert torch.allclose(LOSSES["weighted_cross_entropy"](logits, y), (weight * nats).sum() / weight.sum())
    assert torch.allclose(LOSSES["weighted_cross_entropy"](logits[:3], y[:3]), nats[:3].mean()) and answered(y) == 4
    values = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    out = torch.tensor([[0.0, 9.0], [2.0, -1.0]])
    assert LOSSES["l1"](out, values) == pytest.approx(5 / 3) and LOSSES["mse"](out, values) == pytest.approx(9 / 3)
    expected = [math.log1p(math.exp(-0.0)), math.log1p(math.exp(2.0)), math.log1p(math.exp(1.0))]
    assert LOSSES["bce"](out, values).item() == pytest.approx(sum(expected) / 3) and answered(values) == 3


def out(logits, x=None):
    return SimpleNamespace(logits=logits, x=x)


def test_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    expected = {
        "accuracy": metrics.accuracy_score(y, logits.argmax(1)),
        "macro_f1": metrics.f1_score(y, logits.argmax(1), average="macro"),
        "class_accuracy": metrics.recall_score(y, logits.argmax(1), average="macro", labels=range(4), zero_division=0),
    }
    for how, value in expected.items():
        found = measure(how, 4)
        for part in (slice(0, 25), slice(25, 60)):
            found.add(out(logits[part]), {"y": y[part]})
        assert found.value() == pytest.approx(value)
    labels = (torch.rand(60, 4, generator=generator) < 0.3).float()
    scores = (logits * 3).round()  # with equal ones
    labels[:, 3] = 0  # no positive: left out
    labels[:5, 0] = math.nan
    found, half = measure("ap", 4), measure("ap", 4)
    found.add(out(scores[:30]), {"y": labels[:30]})
    half.add(out(scores[30:]), {"y": labels[30:]})
    found.merge(half)
    known = [~labels[:, c].isnan() for c in range(3)]
    each = [metrics.average_precision_score(labels[k, c], scores[k, c]) for c, k in enumerate(known)]
    assert found.value() == pytest.approx(sum(each) / 3)
    assert average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True])) == pytest.approx(5 / 6)


def test_ranks_are_among_the_nodes_of_the_graph():
    x = torch.tensor([[1.0, 0], [0.5, 0], [2.0, 0], [0, 1.0], [0, 3.0]])
    batch = {"batch": torch.tensor([0, 0, 0, 1, 1]), "y": torch.tensor([1.0, 0.0, 1.0])}
    batch["edge_label_index"] = torch.tensor([[0, 0, 3], [1, 2, 4]])
    found = measure("mrr", 1)
    found.add(out(None, x), batch)  # node 1 is third of 0, 1, 2 for node 0; node 4 first for node 3
    assert found.value() == pytest.approx((1 / 3 + 1) / 2)
    error = measure("mae", 2)
    error.add(out(torch.tensor([[1.0, 2.0]])), {"y": torch.tensor([[0.0, math.nan]])})
    assert error.value() == 1


@pytest.mark.parametrize("level", ["graph", "node", "edge"])
def test_a_batch_in_parts_is_the_whole_batch(level):
    """What is done when memory runs out."""
    torch.manual_seed(0)
    graphs = []
    for n in (3, 1, 4, 2, 5):
        graph = {"x": torch.randn(n, 3), "edge_index": torch.randint(n, (2, 2 * n)), "edge_attr": torch.randn(2 * n, 1)}
        rows = {"graph": 1, "node": n, "edge": 2}[level]
        more = {"edge_label_index": torch.randint(n, (2, 2))} if level == "edge" else {}
        graphs.append(graph | more | {"y": torch.randint(2, (rows,))})
    for parts in (2, 3):
        got = split(collate(graphs), parts)
        edges = [len(graphs) * i // parts for i in range(parts + 1)]
        for part, first, end in zip(got, edges, edges[1:]):
            expected = collate(graphs[first:end])
            assert part.keys() == expected.keys() and part["num_graphs"] == expected["num_graphs"]
            assert all(torch.equal(part[k], v) for k, v in expected.items() if k != "num_graphs")


def test_labels_beyond_the_model_are_named():
    task = GraphLearning(GraphMamba(num_classes=2, node_dim=3, edge_dim=0, d_model=8, n_layer=1))
    batch = collate([{"x": torch.randn(3, 3), "edge_index": torch.tensor([[0], [1]]), "y": torch.tensor([2])}])
    with pytest.raises(ValueError, match=r"y holds class 2, but the model has 2 classes \(0 to 1\)"):
        task.step(batch, training=True)


RECIPES = {  # layers, width, graphs per step, rate, weight decay, epochs, warm-up epochs, frequencies, width of them
    "peptides_func": (3, 96, 128, 1e-3, 0.01, 200, 10, 10, 16),
    "peptides_struct": (4, 96, 128, 1e-3, 0.01, 200, 10, 10, 16),
    "pcqm_contact": (4, 96, 128, 2e-3, 0.01, 100, None, 10, 16),
    "pascalvoc_sp": (4, 96, 32, 1.5e-3, 1e-3, 300, 10, 10, 16),
    "coco_sp": (4, 96, 32, 1.5e-3, 1e-3, 300, 10, 10, 16),
    "malnet_tiny": (5, 64, 16, 1.5e-3, 1e-5, 150, 10, None, None),
    "mnist": (3, 52, 16, 5e-3, 0.01, 100, 5, 8, 8),
    "cifar10": (3, 52, 16, 5e-3, 0.01, 100, 5, 8, 8),
    "cluster": (16, 48, 16, 1e-3, 1e-4, 100, 5, 10, 16),
    "pattern": (6, 64, 32, 1e-3, 1e-4, 100, 5, 16, 16),
}
SETS = {
    "malnet_tiny": "MalNetTiny",
    "pascalvoc_sp": "PascalVOC-SP",
    "coco_sp": "COCO-SP",
    "pcqm_contact": "PCQM-Contact",
}
SETS |= {"peptides_func": "Peptides-func", "peptides_struct": "Peptides-struct"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_numbers_and_its_model_takes_graphs_of_that_set(name):
    from hydra import compose, initialize_config_dir

    from ssmzoo.data.graphs.encodings import encode
    from ssmzoo.data.graphs.pyg import KNOWN
    from ssmzoo.presets import build_model, config_dir
    from ssmzoo.train.config import check, register_resolvers, set_sizes

    register_resolvers()
    entry = KNOWN[SETS.get(name, name.upper())]
    edge_dim = {"PascalVOC-SP": 2, "COCO-SP": 2, "MNIST": 1, "CIFAR10": 1}.get(entry.name, 0)
    node_dim = {"MNIST": 3, "CIFAR10": 5, "PATTERN": 3, "CLUSTER": 7}.get(entry.name, 14 if edge_dim else 5)
    sizes = {"node_dim": node_dim, "edge_dim": edge_dim, "num_classes": entry.outputs, "level": entry.level}
    set_sizes(sizes | {k: getattr(entry, k) for k in ("loss", "metric", "node_vocab", "edge_vocab")})
    with initialize_config_dir(str(config_dir()), version_base=None):
        cfg = compose("train", overrides=[f"experiment=graphs/{name}"])
    check(cfg)
    layers, width, batch, rate, decay, epochs, warm, freqs, dim_pe = RECIPES[name]
    lap = cfg.model.get("lap_pe") or {}
    assert (cfg.model.n_layer, cfg.model.d_model, cfg.data.batch_size) == (layers, width, batch)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.trainer.max_epochs) == (rate, decay, epochs)
    assert (lap.get("max_freqs"), lap.get("dim_pe"), cfg.data.get("max_freqs")) == (freqs, dim_pe, freqs)
    assert cfg.data.dataset == f"pyg/{entry.name or entry.cls}" and cfg.trainer.gradient_clip_val == 1.0
    assert warm is None or cfg.optim.warmup_steps == warm * cfg.optim.stair_steps

    from omegaconf import OmegaConf

    cfg = OmegaConf.to_container(cfg, resolve=True)
    model = build_model(cfg["model"])
    edges, (nodes, links) = torch.randint(6, (2, 10)), (entry.node_vocab, entry.edge_vocab)
    graph = {"x": torch.zeros(6, len(nodes)).long() if nodes else torch.randn(6, node_dim), "edge_index": edges}
    if links or edge_dim:
        graph["edge_attr"] = torch.zeros(10, len(links)).long() if links else torch.randn(10, edge_dim)
    y = {"l1": torch.randn(1, entry.outputs), "bce": torch.ones(1, entry.outputs)}.get(entry.loss, torch.tensor([1]))
    y = {"graph": y, "node": torch.ones(6).long(), "edge": torch.tensor([1.0, 0.0])}[entry.level]
    more = {"edge_label_index": edges[:, :2]} if entry.level == "edge" else {}
    batch = collate([encode(graph, cfg["data"]["encodings"], freqs or 10) | more | {"y": y}] * 2)
    task = GraphLearning(model, loss=cfg["task"]["loss"], metric=cfg["task"]["metric"])
    task.step(batch, training=True).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    set_sizes({})


def test_every_recipe_is_here():
    from ssmzoo.presets import config_names

    assert {n.partition("/")[2] for n in config_names("experiment") if n.startswith("graphs/")} == set(RECIPES)
