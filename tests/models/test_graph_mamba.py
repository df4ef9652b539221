"""Graph-Mamba: the layer against a transcription of its equations, orders, packing, encodings, and what is refused."""

import math

import pytest
import torch
from torch.func import functional_call, jvp

from ssmzoo.layers.graph.batch import Graphs, pool
from ssmzoo.layers.graph.encoders import LapPE
from ssmzoo.layers.graph.gps import GPSLayer
from ssmzoo.layers.graph.local import GINE, GatedGCN, local_model
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.graph_baselines import GPS, GatedGCNModel
from ssmzoo.models.graph_mamba import GraphMamba
from ssmzoo.models.graph_mamba_layers.order import ORDERS, Draws, draw, scan_order
from ssmzoo.models.graph_mamba_layers.scan import NodeScan
from ssmzoo.released.family import to_official
from ssmzoo.released.load import load_official

MODELS = {"graph_mamba": GraphMamba, "gps": GPS, "gated_gcn": GatedGCNModel}
SMALL = {"num_classes": 5, "node_dim": 3, "edge_dim": 2, "d_model": 16, "n_layer": 2}


def graphs(sizes=(5, 1, 9), edges=3, dtype=torch.float32, **more) -> dict:
    """Random graphs with self-loops, double edges, isolated nodes, and one of a single node."""
    generator = torch.Generator().manual_seed(len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    linked = [torch.randint(n, (2, edges * n), generator=generator) + s for n, s in zip(sizes, starts)]
    v, m = sum(sizes), sum(edges * n for n in sizes)
    return {
        "x": torch.randn(v, 3, generator=generator, dtype=dtype),
        "edge_index": torch.cat(linked, dim=1),
        "edge_attr": torch.randn(m, 2, generator=generator, dtype=dtype),
        "batch": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        "num_graphs": len(sizes),
        "EigCentrality": torch.rand(v, generator=generator, dtype=dtype),
        "pestat_RWSE": torch.rand(v, 4, generator=generator, dtype=dtype),
        "LouvainCluster": torch.randint(2, (v,), generator=generator),
    } | more


def batch_norm(norm, x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


def mamba(layer, u):
    """Section "Global model" of the card, token by token: u (l d) -> (l d)."""
    x, z = (layer.in_proj.weight @ u.T).chunk(2)
    taps, state, ys = layer.conv1d.weight.shape[-1], torch.zeros(layer.d_inner, layer.d_state, dtype=u.dtype), []
    for t in range(len(u)):
        window = [x[:, t - k] * layer.conv1d.weight[:, 0, taps - 1 - k] for k in range(taps) if t >= k]
        inner = torch.nn.functional.silu(sum(window) + layer.conv1d.bias)
        dt, B, C = (layer.x_proj.weight @ inner).split([layer.dt_rank, layer.d_state, layer.d_state])
        dt = torch.nn.functional.softplus(layer.dt_proj.weight @ dt + layer.dt_proj.bias)
        state = torch.exp(-dt[:, None] * layer.A_log.exp()) * state + (dt * inner)[:, None] * B
        y = state @ C + layer.D * inner
        ys.append(layer.out_proj.weight @ (y * torch.nn.functional.silu(z[:, t])))
    return torch.stack(ys)


def gated_gcn(layer, h, e, edge_index):
    edges, top, bottom = [], torch.zeros_like(h), torch.full_like(h, 1e-6)
    for k, (j, i) in enumerate(edge_index.T.tolist()):
        edges.append(layer.D(h[i]) + layer.E(h[j]) + layer.C(e[k]))
        gate = 1 / (1 + torch.exp(-edges[-1]))
        top[i] = top[i] + gate * layer.B(h[j])
        bottom[i] = bottom[i] + gate
    nodes = layer.A(h) + top / bottom
    return h + batch_norm(layer.bn_node_x, nodes).relu(), e + batch_norm(layer.bn_edge_e, torch.stack(edges)).relu()


def scanned(layer, h, batch, key, bucket):
    """Every graph, or graph and bucket, a sequence of its own in ascending order of the key."""
    out = torch.zeros_like(h)
    for g, b in {(int(g), int(b)) for g, b in zip(batch, bucket)}:
        members = ((batch == g) & (bucket == b)).nonzero().flatten()
        order = sorted(members.tolist(), key=lambda i: (float(key[i]), i))
        out[order] = mamba(layer, h[order])
    return out


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_a_layer_is_its_equations(buckets, count):
    """float64, in training mode: values, and gradients of a weighted sum."""
    torch.manual_seed(1)
    given = graphs(dtype=torch.float64)
    d, v, m = 8, len(given["x"]), given["edge_index"].shape[1]
    layer = GPSLayer(d, GatedGCN(d), NodeScan(d, buckets=buckets)).double()
    h, e = torch.randn(v, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    draws = Draws(torch.rand(count, v), torch.randint(buckets, (count, v)) if buckets > 1 else None)
    batch = Graphs.of(given)._replace(x=h, edge_attr=e)
    out = layer(batch, draws=draws)

    local, edges = gated_gcn(layer.local_model, h, e, given["edge_index"])
    degree = torch.tensor([int((given["edge_index"][0] == i).sum()) for i in range(v)])
    none = torch.zeros(v)
    passes = [
        scanned(layer.self_attn, h, given["batch"], degree + draws.noise[i], none if buckets == 1 else draws.bucket[i])
        for i in range(count)
    ]
    u = batch_norm(layer.norm1_local, local) + batch_norm(layer.norm1_attn, h + sum(passes) / count)
    ff = torch.relu(u @ layer.ff_linear1.weight.T + layer.ff_linear1.bias)
    expected = batch_norm(layer.norm2, u + ff @ layer.ff_linear2.weight.T + layer.ff_linear2.bias)
    assert torch.allclose(out.x, expected, atol=1e-9) and torch.allclose(out.edge_attr, edges, atol=1e-9)

    parameters, weights = list(layer.parameters()), torch.randn_like(expected)
    for pair in zip(
        *(
            torch.autograd.grad((x * weights).sum() + edges_.sum(), parameters)
            for x, edges_ in ((out.x, out.edge_attr), (expected, edges))
        )
    ):
        assert torch.allclose(*pair, atol=1e-7)


def test_packed_graphs_equal_each_graph_alone_in_every_order():
    given, scan = Graphs.of(graphs()), NodeScan(16).eval()
    h = torch.randn(len(given.x), 16)
    for order in ORDERS:
        scan.order = order
        draws = draw(given, 1, 1, seed=0)
        places, sequence = scan_order(order, given, draws, training=False)
        assert torch.equal(sequence[0], given.batch) and places[0].sort().values.tolist() == list(range(len(h)))
        got = scan(h, given, draws)
        for g in range(3):
            mine = places[0][given.batch[places[0]] == g]
            alone, _ = Mamba.forward(scan, h[mine][None])
            assert torch.allclose(got[mine], alone[0], atol=1e-6)


def test_the_orders_are_what_they_are_called():
    star = {"x": torch.zeros(5, 1), "edge_index": torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])}
    star |= {"EigCentrality": torch.tensor([0.9, 0.3, 0.1, 0.2, 0.0])}
    star |= {"pestat_RWSE": torch.tensor([[1.0], [0.3], [0.1], [0.2], [0.0]])}
    star |= {"LouvainCluster": torch.tensor([0, 0, 1, 0, 1])}
    given = Graphs.of(star)
    noise = torch.tensor([[0.5, 0.1, 0.4, 0.3, 0.2]])
    found = {o: scan_order(o, given, Draws(noise, None), False)[0][0].tolist() for o in ORDERS}
    assert found["stored"] == [0, 1, 2, 3, 4] and found["random"] == [1, 4, 3, 2, 0]
    assert found["degree"] == [4, 1, 2, 3, 0] and found["degree_noise"] == [4, 1, 3, 2, 0]
    assert found["eigen"] == [4, 2, 3, 1, 0] and found["random_walk"] == [4, 1, 3, 2, 0]
    assert found["cluster"] == [4, 1, 3, 2, 0]
    bucket = torch.tensor([[0, 1, 1, 0, 2]])
    places, sequence = scan_order("degree_noise", given, Draws(noise, bucket), False)
    assert places[0].tolist() == [3, 0, 1, 2, 4] and sequence[0].tolist() == [0, 0, 1, 1, 2]


def test_training_shuffles_equal_degrees_anew_and_jitters_scores():
    given, scan = Graphs.of(graphs((40,), edges=2)), NodeScan(8).train()
    h = torch.randn(40, 8)
    assert not torch.allclose(scan(h, given), scan(h, given))
    for order in ("eigen", "random_walk"):
        a, b = (scan_order(order, given, draw(given, 1, 1, None), True)[0] for _ in range(2))
        assert not torch.equal(a, b) and torch.equal(given.degree()[a], given.degree()[b])


@pytest.mark.parametrize("buckets", [1, 3])
def test_an_evaluation_depends_neither_on_the_batch_nor_on_the_moment(buckets):
    model = GraphMamba(**SMALL, buckets=buckets).eval()
    given = graphs()
    first, again = model(given).logits, model(given).logits
    last = given["batch"] == 2
    edges = last[given["edge_index"][0]]
    alone = {
        "x": given["x"][last],
        "edge_index": given["edge_index"][:, edges] - 6,
        "edge_attr": given["edge_attr"][edges],
    }
    assert torch.equal(first, again) and torch.allclose(model(alone).logits[0], first[2], atol=1e-5)
    one = GraphMamba(**SMALL, buckets=buckets, average=1).eval()
    one.load_state_dict(model.state_dict())
    assert not torch.allclose(one(given).logits, first, atol=1e-4)  # five orders are not one


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", ["graph", "node", "edge"])
def test_every_level_has_its_outputs_and_every_parameter_a_gradient(name, level):
    model = MODELS[name](**SMALL, level=level, rwse={"dim_pe": 4, "steps": 4})
    given = graphs(edge_label_index=torch.tensor([[0, 6, 7], [1, 8, 14]]))
    out = model(given)
    assert out.logits.shape == {"graph": (3, 5), "node": (15, 5), "edge": (3,)}[level]
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    last = f"layers.{SMALL['n_layer'] - 1}.local_model.bn_edge_e"  # nobody reads the last layer's edges
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.grad is None} == {last}


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_model_guesses(name):
    model = MODELS[name](**(SMALL | {"d_model": 48}))
    y = torch.randint(5, (64,))
    loss = torch.nn.functional.cross_entropy(model(graphs((12,) * 64)).logits, y)
    assert abs(loss.item() - math.log(5)) < 0.3


@pytest.mark.parametrize("name", ["graph_mamba", "gated_gcn"])
def test_forward_mode_equals_reverse_mode(name):
    """The test of all other models is over samples of a tensor, which graphs are not; torch's fused attention, which
    gps uses, has no forward mode."""
    model = MODELS[name](**SMALL).double().eval()
    given = graphs(dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    y, dy = jvp(lambda p: functional_call(model, p, (given,)).logits, (parameters,), (tangents,))
    weights = torch.randn_like(y)
    (model(given).logits * weights).sum().backward()
    right = sum((p.grad * tangents[n]).sum() for n, p in model.named_parameters() if p.grad is not None)
    assert torch.allclose((dy * weights).sum(), right, rtol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_in_another_order_and_other_neighbours_in_the_batch(name):
    """Message passing and attention do not care; the scan does, through ties only."""
    model = MODELS[name](**SMALL, level="node", **({"order": "eigen"} if name == "graph_mamba" else {})).eval()
    given = graphs((7, 4))
    shuffled = torch.cat([torch.randperm(7), 7 + torch.randperm(4)])
    moved = given | {k: given[k][shuffled] for k in ("x", "EigCentrality", "pestat_RWSE", "LouvainCluster")}
    moved["edge_index"] = shuffled.argsort()[given["edge_index"]]
    assert torch.allclose(model(moved).logits, model(given).logits[shuffled], atol=1e-5)


def test_message_passing_alone_ends_after_n_layer_edges_and_the_scan_does_not():
    path = torch.stack([torch.arange(9), torch.arange(1, 10)])
    given = {"x": torch.randn(10, 3), "edge_index": torch.cat([path, path.flip(0)], 1), "edge_attr": torch.randn(18, 2)}
    changed = given | {"x": given["x"] + torch.eye(10)[:, :1] * 100}  # of node 0
    for name, reaches in (("gated_gcn", False), ("gps", True), ("graph_mamba", True)):
        model = MODELS[name](**SMALL, level="node").eval()
        moved = (model(changed).logits - model(given).logits).abs().sum(1) > 0
        assert bool(moved[:3].all()) and bool(moved[3:].all()) == reaches and bool(moved[3:].any()) == reaches, name


def test_laplacian_encoding_is_a_sum_over_signed_frequencies_that_exist():
    torch.manual_seed(0)
    pe = LapPE(dim_pe=3, max_freqs=4, layers=3, post_layers=2).double()
    vectors, values = torch.randn(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    vectors[1, 2:], values[1, 2:] = math.nan, math.nan
    given = {
        "x": torch.zeros(2, 1),
        "edge_index": torch.zeros(2, 0).long(),
        "EigVecs": vectors,
        "EigVals": values[..., None],
    }

    def expected(signs):
        rows = []
        for node in range(2):
            pairs = [torch.stack([vectors[node, q] * signs[q], values[node, q]]) for q in range(4 - 2 * node)]
            rows.append(pe.post_mlp(sum(pe.pe_encoder(pe.linear_A(pair)) for pair in pairs)))
        return torch.stack(rows)

    assert torch.allclose(pe.eval()(Graphs.of(given)), expected([1, 1, 1, 1]))
    torch.manual_seed(5)
    signs = (torch.rand(4) < 0.5).float() * 2 - 1
    torch.manual_seed(5)
    assert signs.unique().numel() == 2 and torch.allclose(pe.train()(Graphs.of(given)), expected(signs.tolist()))


def test_pooling():
    given, x = Graphs.of(graphs((2, 3))), torch.randn(5, 4)
    for how, function in (("mean", lambda t: t.mean(0)), ("sum", lambda t: t.sum(0)), ("max", lambda t: t.amax(0))):
        assert torch.allclose(pool(x, given, how), torch.stack([function(x[:2]), function(x[2:])]))


def test_unusual_graphs_are_computed():
    """Without edges, of one node, with self-loops only; in training a batch of one node has no variance."""
    none = {"x": torch.randn(3, 3), "edge_index": torch.zeros(2, 0).long(), "edge_attr": torch.zeros(0, 2)}
    one = {k: v[:1] if k == "x" else v for k, v in none.items()}
    loops = none | {"edge_index": torch.arange(3).expand(2, 3), "edge_attr": torch.randn(3, 2)}
    for given in (none, one, loops):
        for name in MODELS:
            for model in (
                MODELS[name](**SMALL),
                MODELS[name](**SMALL).eval(),
                MODELS[name](**SMALL, local_model="gine"),
            ):
                out = model(given).logits
                assert out.shape == (1, 5) and bool(out.isfinite().all())
                out.sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(0, 3)}, "x has shape (0, 3); expected (nodes, features) with at least one node"),
        ({"x": None}, "needs the tensors x and edge_index"),
        ({"edge_index": torch.zeros(3, 2).long()}, "edge_index has shape (3, 2)"),
        ({"edge_index": torch.full((2, 45), 15)}, "edge_index names node 15, but there are 15 nodes (0 to 14)"),
        ({"edge_index": torch.full((2, 45), -1)}, "edge_index names node -1"),
        ({"edge_attr": torch.zeros(4, 2)}, "edge_attr has shape (4, 2); edge_index has 45 edges"),
        ({"edge_attr": torch.zeros(45, 3)}, "edge_attr has 3 features an edge, the model was built for 2 (edge_dim)"),
        ({"edge_attr": None}, "the model was built for 2 features an edge"),
        ({"x": torch.zeros(15, 4)}, "x has 4 features a node, the model was built for 3 (node_dim)"),
        ({"batch": torch.zeros(4).long()}, "batch has shape (4,); expected (15,)"),
        ({"batch": torch.arange(15).flip(0)}, "batch must ascend from 0"),
        ({"num_graphs": 2}, "batch names graph 2, but num_graphs is 2"),
        ({"EigCentrality": torch.zeros(3)}, "EigCentrality has 3 rows; there are 15 nodes"),
    ],
)
def test_what_is_no_batch_of_graphs_is_refused_in_one_line(change, words):
    with pytest.raises(ValueError) as error:
        GraphMamba(**SMALL)(graphs() | change)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"order": "degre"}, "order is 'degre'; nearest: degree"),
        ({"local_model": "gated_gnc"}, "local_model is 'gated_gnc'; nearest: gated_gcn"),
        ({"level": "graf"}, "level is 'graf'; choose one of graph, node, edge"),
        ({"pool": "min"}, "pool is 'min'; choose one of mean, max, sum"),
        ({"lap_pe": {"dim_pe": 16}}, "d_model = 16 leaves no room beside encodings 16 wide"),
        ({"average": 0}, "buckets = 1 and average = 0 must be at least 1"),
    ],
)
def test_arguments_that_do_not_exist_are_refused_with_the_nearest(arguments, words):
    with pytest.raises(ValueError) as error:
        GraphMamba(**(SMALL | arguments))
    assert words in str(error.value)


@pytest.mark.parametrize("arguments, name", [({"order": "eigen"}, "eig_centrality"), ({"order": "cluster"}, "louvain")])
def test_what_an_order_needs_of_the_data_is_said(arguments, name):
    given = {k: v for k, v in graphs().items() if k not in ("EigCentrality", "LouvainCluster")}
    with pytest.raises(ValueError, match=rf"data.encodings=\[{name}\]"):
        GraphMamba(**SMALL, **arguments)(given)


def test_the_official_names_come_back_and_a_released_name_means_its_order():
    layer = GPSLayer(8, GINE(8), NodeScan(8))
    for official_name, order, buckets in (
        ("Mamba_Hybrid_Noise", "random", 3),
        ("Mamba_Hybrid_Noise_Bucket", "random", 1),
        ("Mamba_Eigen", "eigen", 1),
    ):
        module = load_official(
            "graph_mamba", layer.state_dict(), global_model_type=official_name, local_gnn_type="GINE"
        )
        assert (module.self_attn.order, module.self_attn.buckets) == (order, buckets)
        back = to_official("graph_mamba", module)
        assert back.keys() == layer.state_dict().keys() and all(
            torch.equal(back[k], v) for k, v in layer.state_dict().items()
        )
    encoder = {f"{k}": v for k, v in LapPE(6, 5).state_dict().items()} | {
        "linear_x.weight": torch.zeros(8, 4),
        "linear_x.bias": torch.zeros(8),
    }
    module = load_official("graph_mamba", encoder, max_freqs=5)
    assert module.encoder.linear_x.in_features == 4 and to_official("graph_mamba", module).keys() == encoder.keys()
    for wrong, words in (({"global_model_type": "Mamba_Multi"}, "Mamba_Multi"), ({"layer_norm": True}, "layer_norm")):
        with pytest.raises(ValueError, match=words):
            load_official("graph_mamba", layer.state_dict(), local_gnn_type="GINE", **wrong)


def test_a_batch_of_pytorch_geometric_is_a_batch_of_graphs():
    pyg = pytest.importorskip("torch_geometric.data", reason="PyTorch Geometric (extra `graph`) is not installed")
    given = graphs()
    alone = []
    for g in range(3):
        nodes = given["batch"] == g
        edges, first = nodes[given["edge_index"][0]], int(nodes.nonzero()[0])
        alone.append(
            pyg.Data(
                x=given["x"][nodes],
                edge_index=given["edge_index"][:, edges] - first,
                edge_attr=given["edge_attr"][edges],
            )
        )
    model = GraphMamba(**SMALL).eval()
    assert torch.allclose(model(pyg.Batch.from_data_list(alone)).logits, model(given).logits, atol=1e-6)
    assert torch.allclose(model(alone[2]).logits[0], model(given).logits[2], atol=1e-5)


@pytest.mark.parametrize("name", ["gen", "gat", "pna"])
def test_convolutions_of_pytorch_geometric_serve_as_local_models(name):
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs PyTorch Geometric: pip install torch_geometric"):
            local_model(name, 16)
        pytest.skip("PyTorch Geometric (extra `graph`) is not installed")
    out = GraphMamba(**SMALL, local_model=name)(graphs()).logits
    assert out.shape == (3, 5) and bool(out.isfinite().all())


def test_gine_is_that_of_pytorch_geometric():
    pyg = pytest.importorskip("torch_geometric.nn", reason="PyTorch Geometric (extra `graph`) is not installed")
    given = Graphs.of(graphs())._replace(x=torch.randn(15, 8), edge_attr=torch.randn(45, 8))
    ours = GINE(8)
    theirs = pyg.GINEConv(ours.nn)
    assert torch.allclose(ours(given)[0], given.x + theirs(given.x, given.edge_index, given.edge_attr), atol=1e-6)
