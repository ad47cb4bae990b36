"""Any network: what its weights multiply, planes in their place, the same function served."""

import re

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_qat import Net, weight

import mcjax
from mcjax import qat, tree, tune
from mcjax.checkpoint import ArtifactReader
from mcjax.notes import Note
from mcjax.tree.kernel import is_kernel

LAYERS = {
    "dense": (nn.Dense(5), (2, 3, 7)),
    "general": (nn.DenseGeneral((3, 5), axis=(1, -1)), (2, 4, 3, 6)),
    "batched": (nn.DenseGeneral(5, batch_dims=(0,)), (3, 4, 6)),
    "einsum": (nn.Einsum((5, 6, 7), "nac,cde->nade"), (2, 4, 5)),
    "conv": (nn.Conv(6, (3, 2), strides=(2, 1)), (2, 7, 5, 4)),
    "groups": (nn.Conv(6, (3,), feature_group_count=2, kernel_dilation=2), (2, 9, 4)),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, padding="CIRCULAR"), (2, 5, 5, 4)),
    "transposed": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), (2, 4, 4, 3)),
    "flipped": (nn.ConvTranspose(5, (3, 2), strides=(2, 1), transpose_kernel=True), (2, 4, 4, 3)),
    "causal": (nn.Conv(4, (3,), padding="CAUSAL"), (2, 6, 3)),
    "spread": (nn.Conv(4, (3,), padding=((2, 1),), input_dilation=2), (2, 6, 3)),
    "vmapped": (
        nn.vmap(
            nn.Dense,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=1,
            out_axes=1,
        )(5),
        (4, 3, 7),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gram_matrices_are_the_squared_change_of_the_output(name):
    """For any change D of the weight: sum |f(W + D) - f(W)|^2 = tr(D' G D)."""
    layer, shape = LAYERS[name]
    x = weight(*shape)
    params = layer.init(jax.random.key(0), x)["params"]

    def function(params, x):
        return layer.apply({"params": params}, x)

    watched = tree.watch(function, params, [x, 2 * x])["kernel"]
    kernel, change = params["kernel"], weight(*params["kernel"].shape)
    matrices = watched.layout.to_matrices(change)
    np.testing.assert_array_equal(watched.layout.to_weight(matrices), change)
    moved = function(params | {"kernel": kernel + change}, x) - function(params, x)
    inputs = jnp.einsum("...de,...eo->...do", watched.gram, matrices)
    np.testing.assert_allclose(jnp.vdot(matrices, inputs), 5 * jnp.sum(moved**2), rtol=2e-4)


class Block(nn.Module):
    """A layer of an encoder, to be scanned."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.remat(nn.Dense)(96)(x + h)
        return x + nn.Dense(64)(nn.gelu(h)), None


class Encoder(nn.Module):
    """Embedding, scanned layers with their axis in the middle, a head that shares the embedding."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(40, 64)
        x = table(tokens)
        stack = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = stack()(x, None)
        return table.attend(nn.LayerNorm()(x))


class UNet(nn.Module):
    """Convolutions down and up again; one of them is called twice."""

    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(32, (3, 3))(x))
        twice = nn.Conv(48, (3, 3), strides=(2, 2))
        x = nn.relu(twice(first)) + nn.relu(twice(2 * first))
        x = nn.Conv(48, (1, 1), feature_group_count=2)(x)
        x = nn.ConvTranspose(32, (2, 2), strides=(2, 2), transpose_kernel=True)(x)
        return nn.Conv(16, (3, 3), kernel_dilation=2)(jnp.concatenate([x, first], axis=-1))


class Recurrent(nn.Module):
    """A recurrent cell whose four kernels are joined, and a mixture of experts under `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(48))(x)
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=3,
        )
        share = nn.softmax(nn.Dense(3)(x))
        y = jnp.einsum("ebtd,bte->btd", experts(40)(x), share)
        return nn.Dense(8)(y)


def linen(module, x):
    variables = module.init(jax.random.key(0), x)
    return module.apply, variables


def reference(name):
    """A function, its tree, a batch to watch and one that was not watched."""
    if name == "encoder":
        data = [np.random.default_rng(n).integers(0, 40, (4, 10)) for n in range(2)]
        return *linen(Encoder(), data[0]), data
    if name == "unet":
        data = [weight(3, 8, 8, 4), weight(3, 8, 8, 4)]
        return *linen(UNet(), data[0]), data
    if name == "recurrent":
        data = [weight(4, 6, 40), weight(4, 6, 40)]
        return *linen(Recurrent(), data[0]), data

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(64, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(64, 96, rngs=rngs), nnx.Linear(96, 64, rngs=rngs)])

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.layers[1](nnx.gelu(self.layers[0](x)))

    graph, state = nnx.split(Transformer(nnx.Rngs(0)))
    data = [weight(4, 6, 64), weight(4, 6, 64)]
    return lambda state, x: nnx.merge(graph, state)(x), state, data


@pytest.fixture(scope="module", params=["encoder", "unet", "recurrent", "nnx"])
def network(request):
    function, params, data = reference(request.param)
    watched = tree.watch(function, params, data[:1])
    planes, report = tree.shrink(params, watched, [tree.Rule(rotated=request.param == "nnx")])
    return request.param, function, params, data, watched, planes, report


KERNELS = {"encoder": 6, "unet": 5, "recurrent": 11, "nnx": 6}


def test_every_leaf_is_accounted_for(network):
    name, _, params, _, watched, planes, report = network
    leaves = jax.tree.leaves(params)
    assert len(report.leaves) == len(leaves) == len(watched)
    assert [leaf.shape for leaf in report.leaves] == [a.shape for a in leaves]
    made = [leaf for leaf in report.leaves if leaf.bits]
    assert len(made) == KERNELS[name]
    assert sum(map(is_kernel, jax.tree.leaves(planes, is_leaf=is_kernel))) == len(made)
    for leaf in made:
        assert np.all(np.diff(leaf.errors) < 0) and leaf.errors[-1] < 0.25
    assert all(leaf.why for leaf in report.leaves if not leaf.bits)
    if name == "encoder":
        stacked = {leaf.path: leaf.matrices for leaf in made}
        path = "params/ScanBlock_0/MultiHeadDotProductAttention_0/query/kernel"
        assert stacked[path] == (3, 64, 64)
        assert "params/Embed_0/embedding (40, 64): left, used by" in str(report)


def test_served_is_dequantised(network):
    """Under transformations too, and with gradients for what goes in."""
    _, function, params, (_, x), _, planes, _ = network
    served = tree.serving(function)
    error = []
    for bits in (1, 2, 3, 4):
        at = tree.slice_tree(planes, bits)
        dense = tree.dequantize_tree(at)
        assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
        expected = function(dense, x)
        got = jax.jit(served)(at, x)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
        error.append(float(jnp.linalg.norm(expected - function(params, x))))
    assert error[3] < error[2] < error[1] < error[0]
    pair = jnp.stack([x, x])
    np.testing.assert_allclose(
        jax.vmap(lambda one: served(at, one))(pair)[1], expected, rtol=2e-4, atol=2e-4
    )
    _, scanned = jax.lax.scan(lambda c, one: (c, served(at, one)), 0, pair)
    np.testing.assert_allclose(scanned[1], expected, rtol=2e-4, atol=2e-4)
    if jnp.issubdtype(x.dtype, jnp.floating):
        mine, theirs = (
            jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(x)
            for f, p in ((served, at), (function, dense))
        )
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


def test_products_are_those_of_planes(network):
    """No product with few planes of a dense layer writes its weight out first."""
    _, function, _, (_, x), _, planes, report = network
    planes = tree.slice_tree(planes, 2)
    served = tree.serving(function, act_bits=8)
    sizes = {leaf.matrices[-2:] for leaf in report.leaves if leaf.bits and "Conv" not in leaf.path}
    made = {
        tuple(var.aval.shape)
        for eqn in equations(jax.make_jaxpr(served)(planes, x).jaxpr)
        for var in eqn.outvars
        if jnp.issubdtype(var.aval.dtype, jnp.floating)
    }
    assert not sizes & made
    got, expected = jax.jit(served)(planes, x), function(tree.dequantize_tree(planes), x)
    assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 0.05


def equations(jaxpr):
    """Of a program and of those that are called in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_scanned_layers_are_those_of_a_loop():
    """Gram matrices of a scan's layers, of which weights that all share sum theirs."""
    x, ws, shared = weight(8, 16), weight(3, 16, 16), weight(16, 16)

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ p["s"]), None), x, p["w"])[0]

    def looped(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w @ p["s"])
        return x

    one = tree.watch(scanned, {"s": shared, "w": ws}, [x])
    other = tree.watch(looped, {"s": shared, "w": list(ws)}, [x])
    np.testing.assert_allclose(one["s"].gram, other["s"].gram, rtol=1e-4, atol=1e-4)
    for n in range(3):
        np.testing.assert_allclose(one["w"].gram[n], other[f"w/{n}"].gram, rtol=1e-4, atol=1e-4)
    planes, _ = tree.shrink({"s": shared, "w": ws}, one)
    dense = tree.dequantize_tree(planes)
    np.testing.assert_allclose(
        tree.serving(scanned)(planes, x), scanned(dense, x), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_followed_is_told_and_right():
    """Flips, uneven reshapes, weights that are carried, chosen or cut: arrays, named."""
    x = weight(4, 32)
    params = {name: weight(32, 32) for name in ("flip", "carried", "chosen", "cut", "cast")}
    params["uneven"] = weight(48, 32)

    def function(p, x):
        y = x @ p["flip"][::-1] + (x @ p["uneven"].reshape(32, 48))[:, :32]
        y, _ = jax.lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1], 1.01 * c[1]), (y, p["carried"]))
        chosen = jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, p["chosen"])
        return y @ chosen + x @ p["cut"].astype(jnp.int32).astype(jnp.float32) + x @ p["cast"]

    watched = tree.watch(function, params, [x])
    planes, report = tree.shrink(params, watched)
    left = {leaf.path: leaf.why for leaf in report.leaves if not leaf.bits}
    assert set(left) == set(params) - {"cast"}
    assert "scan" in left["carried"] or "while" in left["carried"]
    got = tree.serving(function)(planes, x)
    expected = function(tree.dequantize_tree(planes), x)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_narrow_networks_keep_their_types():
    """Casts before a scan count inside of it, and sums have the type that is asked for."""
    params = {"conv": weight(2, 3, 8, 8), "head": weight(8, 12)}
    x = weight(2, 6, 8).astype(jnp.bfloat16)

    def function(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)

        def layer(x, w):
            return jax.lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ), None

        x, _ = jax.lax.scan(layer, x, p["conv"])
        return jnp.dot(x, p["head"], preferred_element_type=jnp.float32)

    planes, _ = tree.shrink(params, tree.watch(function, params, [x]))
    assert is_kernel(planes["conv"]) and planes["conv"].planes.shape == (2, 24, 8)
    got, expected = tree.serving(function)(planes, x), function(tree.dequantize_tree(planes), x)
    assert got.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_branches_and_loops():
    """What one branch alone multiplies has zeros from the other; `while` is served, not watched."""
    params = {name: weight(32, 32) for name in "abc"}
    x = weight(4, 32)

    def function(p, x):
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["a"], lambda x: jnp.tanh(x @ p["b"]), x)
        return jax.lax.fori_loop(0, 2 + jnp.int32(x[0, 0] > 1e9), lambda _, x: x @ p["c"], x)

    watched = tree.watch(function, params, [x])
    taken, other = ("a", "b") if x[0, 0] > 0 else ("b", "a")
    np.testing.assert_allclose(watched[taken].gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert not watched[other].gram.any()
    assert watched["c"].gram is None
    planes, _ = tree.shrink(params, watched)
    assert is_kernel(planes["a"])
    dense = tree.dequantize_tree(planes)
    got = jax.jit(tree.serving(function))(planes, x)
    np.testing.assert_allclose(got, function(dense, x), rtol=1e-3, atol=1e-3)


def test_inputs_make_better_weights():
    mixing = weight(8, 64)
    x, y = (weight(200, 8) @ mixing + 0.1 * weight(200, 64) for _ in range(2))
    params, function = {"kernel": weight(64, 16)}, lambda p, x: x @ p["kernel"]
    watched = tree.watch(function, params, [x])
    blind = {"kernel": watched["kernel"]._replace(gram=None)}

    def error(seen):
        planes = tree.slice_tree(tree.shrink(params, seen)[0], 2)
        return float(jnp.linalg.norm(tree.serving(function)(planes, y) - function(params, y)))

    assert error(watched) < 0.8 * error(blind)


def test_artifacts(network, tmp_path, monkeypatch):
    """All widths or one come back, of which fewer bits read fewer bytes."""
    name, _, params, _, _, planes, _ = network
    like = params if name == "nnx" else None  # nested dicts need no pattern, an NNX state does
    tree.save(tmp_path / "net", planes, note={"accuracy": 0.9})
    read, sizes = ArtifactReader.read, []

    def counted(self, requests):
        values = read(self, requests)
        sizes[-1] += sum(value.nbytes for value in values)
        return values

    monkeypatch.setattr(ArtifactReader, "read", counted)
    for bits in (1, 4, None):
        sizes.append(0)
        back = tree.load(tmp_path / "net", bits, like)
        expected = planes if bits is None else tree.slice_tree(planes, bits)
        jax.tree.map(np.testing.assert_array_equal, back, expected)
        assert sizes[-1] == sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    assert sizes == sorted(sizes)


def test_rules():
    params = {"a": weight(64, 32), "b": weight(64, 32), "c": weight(32, 8), "d": weight(8)}

    def function(p, x):
        return jnp.dot(x @ p["a"] + x @ p["b"], p["c"]) + p["d"]

    watched = tree.watch(function, params, [weight(4, 64)])
    rules = [
        tree.Rule(pattern="a", bits=None),
        tree.Rule(pattern="c", least=1000),
        tree.Rule(pattern="b|d", bits=8, widths=(2, 8)),
    ]
    planes, report = tree.shrink(params, watched, rules)
    assert planes["b"].planes.widths == (2, 8)
    why = {leaf.path: leaf.why for leaf in report.leaves}
    assert re.fullmatch("used by .*, no product", why.pop("d"))
    assert why == {
        "a": "rule 'a'",
        "b": "",
        "c": "256 numbers, fewer than 1000",
    }
    assert report.coverage == pytest.approx(2048 / (2 * 2048 + 256 + 8))
    assert report.effective_bits < 32


@pytest.mark.parametrize("size", [1, 31])
def test_odd_sizes(size):
    params = {"w": weight(size, 40), "zero": jnp.zeros((40, 64))}

    def function(p, x):
        return x @ p["w"] @ p["zero"]

    planes, report = tree.shrink(params, tree.watch(function, params, [weight(8, size)]))
    np.testing.assert_array_equal(tree.serving(function)(planes, weight(3, size)), 0)
    assert "bytes as planes" in str(report) if size == 1 else report.coverage == 1


def test_frozen_network_equals_the_trained_one(tmp_path):
    spec = qat.QuantSpec(widths=(8, 3, 1))
    net, x = Net(spec), weight(3, 6, 6, 2)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    frozen = tree.freeze_tree(variables["params"], spec)
    tree.save(tmp_path / "net", {"params": frozen, "batch_stats": variables["batch_stats"]})
    serve = Net(qat.QuantSpec(widths=spec.widths, frozen=True))
    for bits in spec.widths:
        trained = jax.jit(net.clone(bits=bits).apply)(variables, x)
        at = jax.jit(serve.clone(bits=bits).apply)
        held = {**variables, "params": tree.slice_tree(frozen, bits)}
        np.testing.assert_allclose(at(held, x), trained, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(at(tree.load(tmp_path / "net", bits), x), trained, atol=1e-5)
    with pytest.raises(ValueError, match="give bits"):
        serve.init(jax.random.key(0), x)


def test_bad_input(tmp_path, artifact):
    params = {"layer": {"kernel": weight(64, 8), "bias": weight(8)}}

    def function(p, x):
        return x @ p["layer"]["kernel"] + p["layer"]["bias"]

    x = weight(4, 64)
    watched = tree.watch(function, params, [x])
    gone = {"layer": params["layer"] | {"kernel": params["layer"]["kernel"].at[0, 0].set(jnp.nan)}}
    for message, call in [
        ("there is no batch", lambda: tree.watch(function, params, [])),
        (
            r"kernel multiplies NaN or infinite values, as \d of \d weights do",
            lambda: tree.watch(function, params, [x * np.nan]),
        ),
        ("decide no leaf", lambda: tree.shrink(params, watched, [tree.Rule(pattern="q")])),
        ("is another tree", lambda: tree.shrink({"kernel": weight(3, 3)}, watched)),
        ("layer/kernel: w holds 1 NaN", lambda: tree.shrink(gone, watched)),
        ("layer/kernel: bits must be", lambda: tree.shrink(params, watched, [tree.Rule(bits=9)])),
        ("holds no arrays", lambda: tree.shrink({}, {})),
        ("two leaves are named", lambda: tree.save(tmp_path / "a", {"a/b": x, "a": {"b": x}})),
        ("exists", lambda: tree.save(tmp_path, params)),
        ("holds a model, not a tree", lambda: tree.load(artifact)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "a").exists()
    tree.save(tmp_path / "net", tree.shrink(params, watched)[0])
    with pytest.raises(ValueError, match="bits 7 is not one of"):
        tree.load(tmp_path / "net", 7)
    with pytest.raises(ValueError, match="holds a tree, not a model"):
        mcjax.load(tmp_path / "net")
    with pytest.raises(ValueError, match="holds another tree than `like`"):
        tree.load(tmp_path / "net", like={"layer": params["layer"]["kernel"]})


def test_bare_functions_write_weights_out():
    """And say so; where they cannot, they say what to do."""
    x = weight(4, 64)
    graph, state = nnx.split(nnx.Linear(64, 48, rngs=nnx.Rngs(0)))
    for function, params in (
        linen(nn.Dense(48), x),
        (lambda state, x: nnx.merge(graph, state)(x), state),
        (lambda p, x: x @ p["kernel"], {"kernel": weight(64, 48)}),
    ):
        planes, _ = tree.shrink(params, tree.watch(function, params, [x]))
        with pytest.warns(Note, match=r"mcjax.tree.serving\(function\) multiplies planes"):
            bare = jax.jit(function)(planes, x)
        expected = tree.serving(function)(planes, x)
        np.testing.assert_allclose(bare, expected, rtol=1e-4, atol=1e-4)
    function, params, (x, _) = reference("encoder")
    planes, _ = tree.shrink(params, tree.watch(function, params, [x]))
    with pytest.raises(ValueError, match="cut parameters apart"):
        function(planes, x)


def test_any_structure_is_kept(tmp_path):
    """Lists, keys with dots and slashes of their own, and arrays of every type."""
    kept = {"a.b": [jnp.ones(2), {"c d/e%": jnp.arange(3)}], "5": jnp.bfloat16(2.5)}
    tree.save(tmp_path / "net", kept)
    back = tree.load(tmp_path / "net", like=kept)
    jax.tree.map(np.testing.assert_array_equal, back, kept)
    assert set(tree.load(tmp_path / "net")) == {"a.b", "5"}


@pytest.fixture(scope="module")
def uneven():
    """A network of two layers, of whose result the second makes nearly all."""
    params = {"a": {"kernel": weight(64, 64)}, "b": {"kernel": weight(64, 32)}, "c": weight(32)}

    def function(p, x):
        return 0.05 * jnp.tanh(x @ p["a"]["kernel"])[:, :32] + x @ p["b"]["kernel"] + p["c"]

    x = weight(64, 8) @ weight(8, 64) / 3 + 0.1 * weight(64, 64)
    watched = tree.watch(function, params, [x])
    return function, params, x, watched, tree.shrink(params, watched)[0]


def test_budgets_follow_costs(uneven, tmp_path):
    function, params, x, _, planes = uneven
    costs = tree.costs(function, params, planes, [x, 2 * x])
    assert all(np.all(np.diff(cost) < 0) for cost in costs.values())
    before, held = function(params, x), tree.dequantize_tree(planes)
    moved = function({**params, "b": held["b"]}, x)
    found = tree.costs(function, params, planes, [x])["b/kernel"][-1]
    np.testing.assert_allclose(found, tree.squared_change(before, moved), rtol=1e-4)

    widths = tree.allocate(planes, costs, 2)
    assert widths == {"a/kernel": 1, "b/kernel": 4}  # 64 x 64 at 1 and 64 x 32 at 4: 2 on average
    served = tree.slice_tree(planes, widths)

    def cost(at):
        return tree.squared_change(before, tree.serving(function)(at, x))

    assert cost(served) < 0.5 * cost(tree.slice_tree(planes, 2))
    limit = sum(leaf.nbytes for leaf in jax.tree.leaves(served))
    assert tree.allocate(planes, costs, f"{limit}B") == widths
    tree.save(tmp_path / "net", planes)
    jax.tree.map(np.testing.assert_array_equal, tree.load(tmp_path / "net", widths), served)
    several = mcjax.quantize(weight(2, 32, 8), 2).slice((1, 2))
    for message, call in (
        ("budget 5.0 is not feasible", lambda: tree.allocate(planes, costs, 5)),
        ("a budget of 100 bytes is not", lambda: tree.allocate(planes, costs, "100B")),
        ("costs are of other weights", lambda: tree.allocate(planes, {}, 2)),
        ("b/kernel has widths", lambda: tree.allocate(planes, costs | {"b/kernel": [1.0]}, 2)),
        ("finite numbers", lambda: tree.allocate(planes, costs | {"b/kernel": 4 * [np.nan]}, 2)),
        ("no weight of the tree", lambda: tree.allocate(params, {}, 2)),
        ("b/kernel has widths", lambda: tree.slice_tree(planes, {"a/kernel": 1, "b/kernel": 5})),
        ("gives no floating-point", lambda: tree.costs(lambda *_: 1, params, planes, [x])),
        ("widths of other weights", lambda: tree.slice_tree(planes, {"a/kernel": 2})),
        ("several widths already", lambda: tree.slice_tree({"w": several}, 2)),
        ("widths of other weights", lambda: tree.load(tmp_path / "net", {"a/kernel": 2})),
        ("there is no batch", lambda: tree.costs(function, params, planes, [])),
        ("no weight of the tree", lambda: tree.costs(function, params, params, [x])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_training_once_for_every_width(uneven):
    """What trains is what is served; weights and tables both learn."""
    function, params, x, watched, _ = uneven
    spec = qat.QuantSpec(widths=(4, 2), group_size=32, act_bits=None)
    quantizers, target = tree.once.init(params, watched, spec), function(params, x)
    assert set(quantizers) == {"a/kernel", "b/kernel"}
    of_params, of_quantizers = labels = tree.once.labels(params, quantizers)
    assert of_params == {"a": {"kernel": "weight"}, "b": {"kernel": "weight"}, "c": "other"}
    assert set(jax.tree.leaves(of_quantizers)) == {"table"}

    @jax.jit
    def step(both, state):
        def loss(both):
            given = [tree.once.apply(*both, bits) for bits in spec.widths]
            return sum(jnp.mean((function(p, x) - target) ** 2) for p in given)

        value, gradient = jax.value_and_grad(loss)(both)
        change, state = optimiser.update(gradient, state)
        return value, optax.apply_updates(both, change), state, gradient

    both, values = (params, quantizers), []
    still = {"weight": optax.adam(0.005), "table": optax.adam(0.005), "other": optax.set_to_zero()}
    optimiser = optax.multi_transform(still, labels)
    state = optimiser.init(both)
    for _ in range(30):
        value, both, state, gradient = step(both, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient[1]["b/kernel"].tables))
    np.testing.assert_array_equal(both[0]["c"], params["c"])
    planes = tree.once.freeze(*both)
    for bits in spec.widths:
        served = tree.serving(function)(tree.slice_tree(planes, bits), x)
        expected = function(tree.once.apply(*both, bits), x)
        np.testing.assert_allclose(served, expected, rtol=1e-3, atol=1e-3)
    again = tree.once.of_planes(planes)
    assert jax.tree.structure(again) == jax.tree.structure(quantizers)
    # Planes of groups of their own: what trains from them begins as what they serve.
    wide = {"kernel": jnp.concatenate([weight(128, 8), 20 * weight(128, 8)])}
    seen = tree.watch(lambda p, x: x @ p["kernel"], wide, [weight(4, 256)])
    planes, _ = tree.shrink(wide, {"kernel": seen["kernel"]._replace(gram=None)})
    dense, own = tree.dequantize_tree(planes), tree.once.of_planes(planes)
    assert own["kernel"].spec.group_size == 128
    begun = tree.once.apply(dense, own, 4)["kernel"]
    for half in (slice(128), slice(128, None)):
        apart = jnp.linalg.norm((begun - dense["kernel"])[half])
        assert apart < 0.2 * jnp.linalg.norm(dense["kernel"][half])
    with pytest.raises(ValueError, match="no weight matching 'q' can be planes"):
        tree.once.init(params, watched, spec, "q")
    with pytest.raises(ValueError, match="there is no leaf 'a/kernel'"):
        tree.once.apply({"b": params["b"]}, quantizers, 2)


def test_tables_of_any_network_train(uneven):
    """With what is not planes, and back into tables; nobody meets `float0`."""
    function, params, x, watched, _ = uneven
    blind = {name: one._replace(gram=None) for name, one in watched.items()}
    planes, _ = tree.shrink(params, blind)
    at, target = tree.slice_tree(planes, 2), function(params, x)
    tuned = tune.init(at)
    assert set(tuned["others"]) == {"c"}

    def loss(tuned):
        return jnp.mean((function(tune.apply(at, tuned), x) - target) ** 2)

    step, optimiser = jax.jit(jax.value_and_grad(loss)), optax.adam(0.01)
    (first, _), state = step(tuned), optimiser.init(tuned)
    for _ in range(30):
        value, gradient = step(tuned)
        change, state = optimiser.update(gradient, state)
        tuned = optax.apply_updates(tuned, change)
    assert value < 0.8 * first
    written = tune.write(at, tuned)
    got = tree.serving(function)(written, x)
    np.testing.assert_allclose(got, function(tune.apply(at, tuned), x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="a/kernel is for widths 2 or another weight"):
        tune.apply(tree.slice_tree(planes, 3), tuned)
    with pytest.raises(ValueError, match="'gone' is no array"):
        tune.init(at, ["gone"])


def test_what_qwix_quantised():
    qwix = pytest.importorskip("qwix")
    params = {"kernel": weight(64, 8), "bias": weight(8)}
    held = params | {"kernel": qwix.quantize(params["kernel"], "int4", channelwise_axes=[1])}
    arrays = tree.from_qwix(held)
    np.testing.assert_array_equal(arrays["kernel"], qwix.dequantize(held["kernel"]))
    np.testing.assert_array_equal(arrays["bias"], params["bias"])
    with pytest.raises(ValueError, match="kernel is quantised by qwix"):
        tree.watch(lambda p, x: x @ p["kernel"], held, [weight(4, 64)])
