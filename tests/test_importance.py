"""The importance of tokens: against derivatives of the whole model, and what it is for."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import importance
from mcjax.calibrate import EXPERTS, observe
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.attention import Context
from mcjax.models.language_model import embed, run_layer
from mcjax.models.weights import Role
from mcjax.ops import Shifted, dot
from mcjax.passes import read_found
from mcjax.quantize import quantize
from mcjax.vocabulary import head_of, log_probabilities

WINDOWS = np.random.default_rng(0).integers(0, 300, (6, 32))


@pytest.fixture(scope="module")
def folder(model_folder):
    return Folder(model_folder)


def read(folder, i):
    own = {}
    for name, value in folder.read_layer(i, np.float32):
        weights.put(own, tuple(name.split(".")), jnp.asarray(value))
    return own


def measured(folder, directory, read, progress=lambda items, **_: items):
    outside = folder.read_rest()
    files = importance.measure(folder.decoder, outside, read, WINDOWS, 4, directory, progress)
    assert sorted(directory.iterdir()) == files
    return list(map(read_found, files))


def test_shifted_products():
    rng = np.random.default_rng(1)
    x, w, shift = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 32), (32, 8), (2, 3, 8)))
    np.testing.assert_allclose(dot(x, Shifted(w, shift)), x @ w + shift, rtol=1e-5, atol=1e-5)
    planes = quantize(jnp.asarray(w), 2)
    gradient = jax.grad(lambda s: jnp.vdot(dot(x, Shifted(planes, s)), shift))(jnp.zeros((6, 8)))
    np.testing.assert_allclose(gradient, shift.reshape(6, 8), rtol=1e-6)


def test_layers_one_by_one_are_the_whole_model(folder, tmp_path):
    """But for inputs that are kept in bfloat16."""
    found = measured(folder, tmp_path / "some", partial(read, folder))
    decoder, outside = folder.decoder, folder.read_rest(np.float32)
    layers = [read(folder, i) for i in range(2)]
    norm, head = head_of(decoder, outside, WINDOWS)
    count = {
        role.name: importance.groups(role)
        for role in importance.products(decoder.layers[0], decoder.width)
    } | {EXPERTS: 1}
    roles = [list(importance.products(layer, decoder.width)) for layer in decoder.layers]

    def likelihoods(shifts, tokens):
        x = embed(decoder, outside, tokens[None], jnp.float32)
        for i, layer in enumerate(decoder.layers):
            own = jax.tree.map(lambda leaf: leaf, layers[i])
            for role in roles[i]:
                weights.put(
                    own, role.path, Shifted(weights.get(own, role.path), shifts[i, role.name])
                )
            own["block"]["shift"] = shifts[i, EXPERTS]
            context = Context(jnp.arange(tokens.size)[None], None)
            x = run_layer(layer, own, x, context, None, decoder.norm_eps)[0]
        return log_probabilities(decoder, norm, head, x)

    zeros = {}
    for i in range(2):
        zeros |= {(i, role.name): jnp.zeros((32, role.shape[-1])) for role in roles[i]}
        zeros[i, EXPERTS] = jnp.zeros((32, decoder.width))
    sizes = {key: [] for key in zeros}
    for n, tokens in enumerate(WINDOWS):
        labels = jax.random.categorical(jax.random.key(n), likelihoods(zeros, tokens))

        def loss(shifts, tokens=tokens, labels=labels):
            likely = likelihoods(shifts, tokens)
            return -jnp.sum(jnp.take_along_axis(likely, labels[..., None], -1))

        for (i, of), gradient in jax.grad(loss)(zeros).items():
            size = np.linalg.norm(gradient.reshape(32, count[of], -1), axis=-1)
            sizes[i, of].append(size)
    for (i, of), each in sizes.items():
        expected = np.stack(each)
        expected = expected / expected.mean(axis=(0, 1))
        got = found[i][of].astype(np.float32)
        assert got.shape == expected.shape
        # A token near a tie of experts may have others in bfloat16.
        close = np.abs(got - expected) < 0.02 + 0.05 * expected
        assert close.mean() > 0.97
    assert set(found[0]) == {"mixer.qkv", "mixer.o", EXPERTS}


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_interrupted(folder, tmp_path, steps):
    """What is done is not done again; once all is measured nothing is computed."""
    layers = []

    def stops(items, description):
        for n, item in enumerate(items):
            if n == steps + 1:
                raise KeyboardInterrupt
            yield item

    def counted(i):
        layers.append(i)
        return read(folder, i)

    complete = measured(folder, tmp_path / "whole", partial(read, folder))
    with contextlib.suppress(KeyboardInterrupt):
        measured(folder, tmp_path / "some", counted, stops)
    assert layers == [0, 1, 1, 0][: steps + 1]
    after = measured(folder, tmp_path / "some", counted)
    assert layers == [0, 1, 1, 0]
    again = measured(folder, tmp_path / "some", None)
    for other in (after, again):
        jax.tree.map(np.testing.assert_array_equal, complete, other)


@pytest.mark.parametrize("d_in", [64, 640, 2048, 4096])
@pytest.mark.parametrize("d_out", [24, 640, 1536, 4096, 14336])
def test_groups(d_in, d_out):
    count = importance.groups(Role(("w",), (d_in, d_out), None, "tap"))
    assert 1 <= count <= importance.GROUPS and d_out % count == 0
    assert count == 1 or d_out / count >= d_in / 2


def test_errors_move_to_where_they_matter_less(folder):
    """The token that counts a hundred times comes out better at every width, the others worse."""
    layer, width = folder.decoder.layers[0], folder.decoder.width
    rng = np.random.default_rng(2)
    x, own = rng.normal(size=(4, 32, width)).astype(np.float32), read(folder, 0)
    matter = {
        role.name: np.ones((4, 32, importance.groups(role)), np.float16)
        for role in importance.products(layer, width)
    }
    matter[EXPERTS] = np.ones((4, 32, 1), np.float16)
    matter["mixer.qkv"][:, 0] = 100
    error = []
    for given in (None, matter):
        _, grams, seen = observe(layer, width, 1e-6, own, x, given)
        w = own["mixer"]["qkv"]
        gram = jnp.broadcast_to(grams["mixer.qkv"][0], (width, width))
        planes = quantize(w, 3, gram=gram)
        h = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * own["mixer_norm"]
        change = [h @ (w - planes.slice(k).dequantize()) for k in (1, 2, 3)]
        error.append([[np.sum(c[:, :1] ** 2), np.sum(c[:, 1:] ** 2)] for c in change])
        assert seen.importance.shape == (128,)
    plain, weighed = np.array(error)
    assert (weighed[:, 0] < 0.6 * plain[:, 0]).all()
    assert (weighed[:, 1] > plain[:, 1]).all()
