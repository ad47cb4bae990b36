"""What parts cost: against derivatives of the whole model, and what it then says."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import allocate, divergence, sensitivity
from mcjax.checkpoint import ArtifactReader
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.language_model import LanguageModel
from mcjax.text import encode_file, windows
from mcjax.tune_artifact import dense_at, first_tables, read_layer

WIDTHS = (4, 3, 2, 1)
"""All that cost something."""


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The model, but that all experts see every token: none changes experts by a step."""
    folder = tmp_path_factory.mktemp("model") / "all"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
    return Folder(folder)


@pytest.fixture(scope="module")
def every(folder, artifact):
    """Parameters at every width, None for the dense ones."""
    reader = ArtifactReader(artifact)
    layers = [read_layer(reader, i) for i in range(2)]
    dense = folder.read(np.float32)
    found = {None: dense}
    for k in WIDTHS:
        made = [dense_at(layer, first_tables(layer), k) for layer in layers]
        stacked = jax.tree.map(lambda *each: np.stack(each), *made)
        found[k] = {**dense, "segment_0": {"layer_0": stacked}}
    return found


@pytest.fixture(scope="module")
def tokens(folder, text_file):
    read = encode_file(folder.tokenizer_path, text_file, folder.decoder.vocab_size, ())
    return windows(read, 48, "text", None)[:16]


@pytest.fixture(scope="module")
def parts(artifact):
    reader = ArtifactReader(artifact)
    return allocate.parts(reader.decoder, reader.manifest)


@pytest.fixture(scope="module")
def found(folder, every, tokens, parts, tmp_path_factory):
    """Costs, measured a layer at a time."""
    decoder, directory = folder.decoder, tmp_path_factory.mktemp("costs")
    dense = every[None]

    def at(k, i):
        return jax.tree.map(jnp.asarray, weights.of_layer(decoder, every[k], i))

    x = np.asarray(dense["embedding"], np.float32)[tokens]
    for i in range(2):
        x = np.asarray(sensitivity.outputs(decoder.layers[i], decoder.norm_eps, at(None, i), x))
    stored = [{}, {}]
    for part in parts:
        stored[part.layer][part.tap] = part.widths
    text = sensitivity.some_of(decoder, tokens, x)
    assert text.windows.shape == (16, 48)

    def measured(read, at):
        given = decoder, stored, folder.read_rest(), read, at, text, 6, directory
        return sensitivity.costs(*given, lambda items, description: items)

    made = measured(lambda i: at(None, i), at)

    def never(*_):
        raise AssertionError("it is measured again")

    jax.tree.map(np.testing.assert_array_equal, made, measured(never, never))
    return text.windows, made


def test_a_small_models_costs_are_measured_on_more_text(folder):
    many = np.arange(400 * 300).reshape(400, 300)
    some = sensitivity.some_of(folder.decoder, many, many[..., None])
    assert some.windows.shape == (8 * sensitivity.WINDOWS, sensitivity.TOKENS)
    assert some.windows[0, 0] == 0 and some.windows[-1, 0] == 399 * 300
    np.testing.assert_array_equal(some.target[..., 0], some.windows)
    large = dataclasses.replace(folder.decoder, segments=folder.decoder.segments * 2_000)
    assert sensitivity.shape_of(large, many) == (sensitivity.WINDOWS, sensitivity.TOKENS)


def test_costs_are_integrals_of_the_whole_models_gradient(folder, every, parts, found):
    tokens, made = found
    apply = jax.jit(LanguageModel(folder.decoder).apply)
    target = apply({"params": every[None]}, tokens)

    @jax.jit
    def slopes(params, changes):
        def loss(params):
            return divergence.divergence(target, apply({"params": params}, tokens))

        gradient = jax.grad(loss)(params)["segment_0"]["layer_0"]
        own = [c["segment_0"]["layer_0"] for c in (params, *changes)]
        return [jax.tree.map(lambda g, a, b: g * (b - a), gradient, own[0], c) for c in own[1:]]

    total = None
    before = None
    for wider, k in zip([None, *WIDTHS], WIDTHS, strict=False):
        place = WIDTHS.index(k)
        narrower = WIDTHS[place + 1] if place + 1 < len(WIDTHS) else k
        rise, fall = slopes(every[k], [every[wider], every[narrower]])
        rise = jax.tree.map(jnp.negative, rise)
        step = rise if before is None else jax.tree.map(jnp.add, rise, before)
        step = jax.tree.map(lambda a: np.asarray(a, np.float64) / 2, step)
        total = step if total is None else jax.tree.map(np.add, total, step)
        before = fall
        for part in parts:
            if k not in part.widths:
                continue
            assert (made[part.layer][part.tap][:, [w == 8 for w in part.widths]] == 0).all()
            expected = sum(weights.get(total, role.path)[part.layer] for role in part.roles)
            axes = tuple(range(1 if part.experts else 0, expected.ndim))
            got = made[part.layer][part.tap][:, part.widths.index(k)]
            wanted = np.atleast_1d(expected.sum(axis=axes))
            np.testing.assert_allclose(got, wanted, atol=0.02 * abs(wanted).max() + 1e-7)


def test_costs_add_up_to_what_is_lost(folder, every, parts, found):
    tokens, made = found
    apply = jax.jit(LanguageModel(folder.decoder).apply)
    target = apply({"params": every[None]}, tokens)
    for k in (3, 2, 1):
        lost = float(divergence.divergence(target, apply({"params": every[k]}, tokens)))
        together = sum(
            made[part.layer][part.tap][
                :, part.widths.index(allocate.stored_at(part.widths, k))
            ].sum()
            for part in parts
        )
        assert together == pytest.approx(lost, rel=0.15), k


def test_a_narrow_width_costs_what_a_wider_one_does(parts):
    part = next(part for part in parts if not part.experts)._replace(layer=0, widths=(2, 3, 4, 8))
    measured = [{part.tap: {"cost": [[-0.5, 0.25, -0.125, 0.0]]}}]
    got = allocate.costs({"statistics": {"parts": measured}}, part)
    np.testing.assert_array_equal(got, [[0.25, 0.25, 1e-15, 1e-15]])


def test_what_no_token_met_is_not_free(parts):
    part = next(part for part in parts if part.experts)
    squared = np.ones((5, 3)) * [[4, 2, 1]]
    cost = np.array([[9, 5, 1]] * 3 + [[-1, 0, 0], [0, 0, 0]])
    measured = [{part.tap: {"squared": squared.tolist(), "cost": cost.tolist()}}]
    got = allocate.costs({"statistics": {"parts": measured}}, part._replace(layer=0))
    np.testing.assert_array_equal(got[:3], cost[:3])
    np.testing.assert_allclose(got[3:], [[26 / 20, 15 / 20, 3 / 20]] * 2)
    assert (np.diff(got, axis=1) <= 0).all()
