"""Any parameter tree: rules, report, freezing, and the artifact."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_qat import Net, weight

import mcjax
from mcjax import qat, tree


@pytest.fixture(scope="module")
def params():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            return nn.Dense(4)(x.reshape(x.shape[0], -1))

    return jax.jit(Plain().init)(jax.random.key(0), weight(2, 4, 4, 3))["params"]


def test_quantize_any_tree(params, tmp_path):
    planes, report = tree.quantize_tree(params)
    assert [leaf.path for leaf in report.leaves if leaf.bits] == ["Conv_0/kernel", "Dense_0/kernel"]
    assert report.coverage == pytest.approx(1 - 12 / (12 + 216 + 512))
    assert "Dense_0/bias (4,): left, no rule matches" in str(report)
    back = tree.dequantize_tree(planes, params)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
    error = np.abs(back["Dense_0"]["kernel"] - params["Dense_0"]["kernel"]).mean()
    coarse = tree.dequantize_tree(tree.slice_tree(planes, 1), params)
    worse = np.abs(coarse["Dense_0"]["kernel"] - params["Dense_0"]["kernel"]).mean()
    assert error < 0.2 * worse
    tree.save(tmp_path / "net", planes, note={"accuracy": 0.9})
    for bits in (None, 1, 3):
        read = tree.load(tmp_path / "net", bits)
        expected = planes if bits is None else tree.slice_tree(planes, bits)
        jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_reading_fewer_bits_reads_fewer_bytes(params, tmp_path):
    from mcjax.checkpoint import ArtifactReader

    planes, _ = tree.quantize_tree(params)
    tree.save(tmp_path / "net", planes)
    sizes = []
    for bits in (1, 4):
        before = ArtifactReader.read
        total = []

        def counted(self, requests, before=before, total=total):
            values = before(self, requests)
            total.extend(v.nbytes for v in values)
            return values

        ArtifactReader.read = counted
        try:
            read = tree.load(tmp_path / "net", bits)
        finally:
            ArtifactReader.read = before
        assert sum(total) == sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        sizes.append(sum(total))
    assert sizes[0] < sizes[1]


def test_gram_matrices_lower_the_output_error():
    x = weight(200, 8) @ weight(8, 64) + 0.1 * weight(200, 64)
    params = {"layer": {"kernel": weight(64, 16)}}
    gram = {"layer/kernel": x.T @ x}

    def error(planes):
        kernel = tree.dequantize_tree(tree.slice_tree(planes, 2), params)["layer"]["kernel"]
        return float(jnp.linalg.norm(x @ (kernel - params["layer"]["kernel"])))

    plain, _ = tree.quantize_tree(params)
    aware, _ = tree.quantize_tree(params, grams=gram)
    assert error(aware) < 0.8 * error(plain)


def test_rules(params):
    rules = [
        tree.Rule(pattern="Conv", bits=None),
        tree.Rule(pattern="kernel", bits=8, widths=(2, 8)),
    ]
    planes, report = tree.quantize_tree(params, rules)
    assert planes["Dense_0"]["kernel"].widths == (2, 8)
    assert "rule 'Conv'" in str(report)
    experts, _ = tree.quantize_tree(
        {"experts": weight(3, 32, 4)}, [tree.Rule(pattern="experts", batch_axes=1)]
    )
    assert experts["experts"].shape == (3, 32, 4)


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


def test_bad_input(params, tmp_path, artifact):
    kernel = tree.Rule(pattern="kernel")
    for message, call in [
        ("match no leaf", lambda: tree.quantize_tree(params, [kernel, tree.Rule(pattern="q")])),
        ("is not a weight", lambda: tree.quantize_tree(params, [tree.Rule(pattern="bias")])),
        ("no rule quantises", lambda: tree.quantize_tree(params, grams={"x": jnp.eye(3)})),
        (
            "Dense_0/kernel: gram",
            lambda: tree.quantize_tree(params, grams={"Dense_0/kernel": jnp.eye(3)}),
        ),
        ("must not hold dots", lambda: tree.save(tmp_path / "a", {"a.b": jnp.ones(2)})),
        ("exists", lambda: tree.save(tmp_path, params)),
        ("holds a model, not a tree", lambda: tree.load(artifact)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "a").exists()
    tree.save(tmp_path / "net", tree.quantize_tree(params)[0])
    with pytest.raises(ValueError, match="bits 7 is not one of"):
        tree.load(tmp_path / "net", 7)
    with pytest.raises(ValueError, match="holds a tree, not a model"):
        mcjax.load(tmp_path / "net")
