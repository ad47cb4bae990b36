"""Residual networks and vision transformers: sizes, shapes, precisions that share parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.models.resnet import Block, ResNet, resnet18, resnet20, resnet50
from mcjax.models.vit import ViT, vit_small, vit_tiny
from mcjax.qat import QuantSpec

SPEC = QuantSpec(widths=(4, 1))


def shapes(model, *image):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))


@pytest.mark.parametrize(
    ("make", "side", "count"),
    [
        (resnet20, 32, 269_722),
        (resnet18, 224, 11_689_512),
        (resnet50, 224, 25_557_032),
        (vit_tiny, 224, 5_717_416),
        (vit_small, 224, 22_050_664),
    ],
)
def test_published_sizes(make, side, count):
    params = shapes(make(), side, side, 3)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def small(which, **fields):
    if which == "vit":
        return ViT(10, patch=4, dim=32, depth=1, heads=2, **fields)
    if which == "imagenet":
        return ResNet(10, (1,), 8, "imagenet", bottleneck=True, **fields)
    return ResNet(10, (1, 1), 8, "cifar", **fields)


@pytest.mark.parametrize("which", ["cifar", "imagenet", "vit"])
def test_precisions_share_parameters(which):
    model, plain = small(which, spec=SPEC), small(which)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = model.init(jax.random.key(0), x)  # not jitted: one compilation a shape
    outputs = []
    for bits in (None, *SPEC.widths):
        own = model.clone(bits=bits)
        assert shapes(own, 8, 8, 1) == jax.eval_shape(lambda: variables)
        outputs.append(jax.jit(own.apply)(variables, x))
        assert outputs[-1].shape == (2, 10) and outputs[-1].dtype == jnp.float32
    errors = [float(jnp.abs(y - outputs[0]).max()) for y in outputs]
    assert 0 < errors[1] < errors[-1]

    # Float weights compute what a network without a spec does.
    def same_leaf(path, leaf):
        value = variables
        for key in path:
            value = value[key.key]
        return value if value.shape == leaf.shape else value[: leaf.shape[0]].reshape(leaf.shape)

    own = jax.tree_util.tree_map_with_path(same_leaf, shapes(plain, 8, 8, 1))
    np.testing.assert_allclose(jax.jit(plain.apply)(own, x), outputs[0], rtol=1e-4, atol=1e-5)


def test_training_updates_the_statistics_of_its_width():
    model = ResNet(10, (1,), 8, spec=SPEC, bits=1)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = model.init(jax.random.key(0), x)  # not jitted: one compilation a shape
    _, new = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, x)
    before, after = (v["batch_stats"]["stem_norm"]["mean"] for v in (variables, new))
    assert int(jnp.sum(jnp.any(before != after, axis=-1))) == 1


def test_activations_have_the_dtype():
    model = resnet20(dtype=jnp.bfloat16)
    variables = shapes(model, 32, 32, 3)
    assert variables == shapes(resnet20(), 32, 32, 3)
    filters = lambda m, name: isinstance(m, Block)  # noqa: E731
    _, seen = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=filters),
        variables,
        jnp.zeros((1, 32, 32, 3)),
    )
    assert {x.dtype for x in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}


def test_bad_shapes():
    with pytest.raises(ValueError, match="patches of 16 do not tile an image of 8x8"):
        shapes(vit_tiny(), 8, 8, 3)
    with pytest.raises(ValueError, match="3 heads cannot share 64 features"):
        shapes(ViT(10, patch=2, dim=64, depth=1, heads=3), 8, 8, 1)
    with pytest.raises(ValueError, match="'mnist'"):
        ResNet(10, (1,), 8, "mnist")
