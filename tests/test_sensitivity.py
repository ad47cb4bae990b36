"""What parts cost: against derivatives of the whole model, and what it then says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import allocate, divergence, parameters, sensitivity
from mcjax.checkpoint import ArtifactReader
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.language_model import LanguageModel, forward
from mcjax.text import encode_file, windows


@pytest.fixture(scope="module")
def given(model_folder, artifact, text_file):
    """The model, its artifact and windows of text."""
    folder, reader = Folder(model_folder), ArtifactReader(artifact)
    tokens = encode_file(folder.tokenizer_path, text_file, folder.decoder.vocab_size, ())
    return folder, reader, windows(tokens, 48, "text", None)[:40]


def costs(folder, reader, tokens, directory):
    every = [parameters.read_every_width(reader, i) for i in range(2)]

    def read(i):
        return weights.of_layer(folder.decoder, folder.read(np.float32), i)

    widths = [{}, {}]
    for part in allocate.parts(reader.decoder, reader.manifest):
        widths[part.layer][part.tap] = part.widths
    found = sensitivity.costs(
        folder.decoder,
        widths,
        folder.read_rest(),
        read,
        lambda i, path, k: every[i][path].slice(k).dequantize(),
        tokens,
        directory,
        list,
    )
    assert not list(directory.iterdir())
    return every, found


def moved(folder, params, every, i, tap, k, experts):
    """Parameters with one part of some experts at k bits."""
    params = jax.tree.map(jnp.copy, params)
    for role in weights.by_tap(folder.decoder.layers[i], folder.decoder.width)[tap]:
        path = ("segment_0", "layer_0", *role.path)
        own = weights.get(params, path)
        new = every[i][role.path].slice(k).dequantize()
        at = (i, experts) if role.routed else (i,)
        weights.put(params, path, own.at[at].set(new[experts] if role.routed else new))
    return params


def test_one_window_is_a_derivative_of_the_whole_model(given, tmp_path):
    folder, reader, tokens = given
    every, found = costs(folder, reader, tokens[:1], tmp_path)
    params = folder.read(np.float32)

    def likelihood(params):
        logits = forward(folder.decoder, params, jnp.asarray(tokens[:1]))[0]
        likely = jax.nn.log_softmax(logits)
        labels = jax.random.categorical(jax.random.key(0), jax.lax.stop_gradient(likely))
        return jnp.sum(jnp.take_along_axis(likely, labels[..., None], axis=-1))

    for i, tap, k, e in [
        (0, "mixer_input", 3, 0),
        (1, "expert_input", 2, 1),
        (0, "expert_hidden", 1, 4),
    ]:
        change = jax.tree.map(
            jnp.subtract, moved(folder, params, every, i, tap, k, jnp.array([e])), params
        )
        _, slope = jax.jvp(likelihood, (params,), (change,))
        part = next(
            p
            for p in allocate.parts(reader.decoder, reader.manifest)
            if (p.layer, p.tap) == (i, tap)
        )
        got = found[i][tap][e if part.experts else 0, part.widths.index(k)]
        assert got == pytest.approx(float(slope) ** 2 / (2 * 48), rel=0.1)


def test_costs_are_what_predictions_diverge_by(given, tmp_path):
    folder, reader, tokens = given
    every, found = costs(folder, reader, tokens, tmp_path)
    params, module = folder.read(np.float32), LanguageModel(folder.decoder)
    logits = jax.jit(partial(module.apply))
    target = logits({"params": params}, tokens)
    for i, tap, k in [(0, "mixer_output", 2), (1, "expert_input", 2), (0, "expert_hidden", 1)]:
        at = moved(folder, params, every, i, tap, k, jnp.arange(5))
        real = float(divergence.divergence(target, logits({"params": at}, tokens)))
        part = next(
            p
            for p in allocate.parts(reader.decoder, reader.manifest)
            if (p.layer, p.tap) == (i, tap)
        )
        got = found[i][tap][:, part.widths.index(k)].sum()
        assert 0.4 < got / real < 2.5, (tap, k, got, real)
