"""LUMix: labels of mixed images against hand-made ones, and exactly plain mixing without shares."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcjax import lumix
from mcjax.lumix import MixedLabels, mix, perturb, soft_targets


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def batch_of(rng, size=6, height=8, width=10, channels=2, classes=5):
    images = rng.normal(size=(size, height, width, channels)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, classes, size, np.int32))


def labels_of(first, second, weight):
    return MixedLabels(jnp.array(first), jnp.array(second), jnp.array(weight, jnp.float32))


LOGITS = jnp.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
LABELS = labels_of([0, 2], [1, 2], [0.8, 0.3])


@pytest.mark.parametrize("per_example", [True, False])
def test_mixup_is_the_weighted_sum_of_partners(per_example):
    images, _ = batch_of(np.random.default_rng(0))
    index = jnp.arange(6)
    mixed, labels = mix(jax.random.key(1), images, index, per_example=per_example)
    assert sorted(labels.second.tolist()) == index.tolist()  # a permutation
    assert labels.first.tolist() == index.tolist() and labels.weight.dtype == jnp.float32
    w = np.asarray(labels.weight)[:, None, None, None]
    np.testing.assert_allclose(mixed, w * images + (1 - w) * images[labels.second], rtol=1e-6)
    assert (len(set(labels.weight.tolist())) == 1) != per_example


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("shape", [(8, 10), (1, 7)])
def test_cutmix_weight_counts_the_pixels_left(shape, per_example):
    images, _ = batch_of(np.random.default_rng(0), 6, *shape)
    index = jnp.arange(6)
    for seed in range(5):
        mixed, labels = mix(
            jax.random.key(seed), images, index, mode="cutmix", per_example=per_example
        )
        own = (np.asarray(mixed) == np.asarray(images)).all(-1)
        other = (np.asarray(mixed) == np.asarray(images[labels.second])).all(-1)
        assert (own | other).all()
        alone = np.asarray(labels.second) == np.arange(6)
        np.testing.assert_allclose(
            np.where(alone, labels.weight, own.mean((1, 2))), labels.weight, rtol=1e-6
        )
        boxes = ~own
        for box in boxes:  # what is not the image's own is one rectangle
            assert (box == np.outer(box.any(1), box.any(0))).all()
            for line in (box.any(1), box.any(0)):
                assert np.abs(np.diff(np.concatenate([[0], line, [0]]).astype(int))).sum() <= 2
        if not per_example:
            assert len(np.unique(boxes[~alone], axis=0)) == 1


def test_cutmix_boxes_have_the_drawn_area():
    images = jnp.zeros((20000, 8, 8, 1))
    _, labels = mix(jax.random.key(0), images, jnp.zeros(20000, int), mode="cutmix")
    # A side s around a uniform centre is clipped to s - s^2 / 4 on average, and s^2 is uniform.
    s = np.sqrt((np.arange(100000) + 0.5) / 100000)
    np.testing.assert_allclose(1 - np.mean((s - s**2 / 4) ** 2), np.mean(labels.weight), atol=0.01)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_is_beta(alpha):
    images = jnp.zeros((20000, 1, 1, 1))
    _, labels = mix(jax.random.key(0), images, jnp.zeros(20000, int), alpha=alpha)
    w = np.asarray(labels.weight)
    assert w.min() >= 0 and w.max() <= 1
    assert abs(w.mean() - 0.5) < 0.015
    assert abs(w.var() - 1 / (4 * (2 * alpha + 1))) < 0.005  # the variance of Beta(alpha, alpha)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_images(dtype):
    images, index = batch_of(np.random.default_rng(0))
    for mode in lumix.MODES:
        mixed, _ = mix(jax.random.key(0), images.astype(dtype), index, mode=mode)
        full, _ = mix(jax.random.key(0), images, index, mode=mode)
        assert mixed.dtype == dtype
        np.testing.assert_allclose(mixed.astype(np.float32), full, atol=0.05)


@pytest.mark.parametrize(("mode", "per_example"), [("mixup", False), ("cutmix", True)])
def test_mix_jit_and_vmap_are_eager(mode, per_example):
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 2)
    batches = [batch_of(rng) for _ in keys]

    def one(key, images, labels, alpha=0.7):
        return mix(key, images, labels, alpha=alpha, mode=mode, per_example=per_example)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    eager = stack(*[one(key, *batch) for key, batch in zip(keys, batches, strict=True)])
    mapped = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)))(keys, *stack(*batches), 0.7)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(mapped), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_one_image_is_its_own_partner():
    image = jnp.ones((1, 4, 4, 3))
    for mode in lumix.MODES:
        mixed, labels = mix(jax.random.key(0), image, jnp.array([7]), mode=mode)
        np.testing.assert_allclose(mixed, image, rtol=1e-6)
        assert labels.second.tolist() == [7]


def test_targets_by_hand():
    np.testing.assert_array_equal(
        soft_targets(LABELS, 3), np.float32([[0.8, 1 - np.float32(0.8), 0], [0, 0, 1]])
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from(["float32", "bfloat16"]))
def test_targets_are_distributions(seed, classes, dtype):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, classes, (2, 9))
    weight = rng.choice([0, 1, rng.random(), 1e-9, 1 - 2**-24], 9)
    targets = soft_targets(labels_of(first, second, weight), classes, jnp.dtype(dtype))
    assert targets.dtype == dtype and targets.shape == (9, classes)
    targets = np.asarray(targets, np.float64)
    assert (targets >= 0).all()
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-7 if dtype == "float32" else 4e-3)
    same = first == second
    np.testing.assert_array_equal(targets[same], np.eye(classes)[first[same]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 20))
def test_perturbed_weights_are_weights(seed, total, part, beta):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, (2, 6))
    labels = labels_of(first, second, rng.choice([0, 1, rng.random()], 6))
    logits = jnp.asarray(rng.normal(size=(6, 4)) * 30, jnp.float32)
    r_s = total * part
    weight = perturb(jax.random.key(seed), logits, labels, r_s, max(total - r_s, 0), beta)
    assert weight.dtype == jnp.float32
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (soft_targets(labels._replace(weight=weight), 4) >= 0).all()


def test_perturbation_by_hand():
    lambda_s = np.array([np.e / (np.e + np.e**2), 0.5])  # p_a / (p_a + p_b)
    lambda_0 = np.array([0.8, 0.3])
    got = perturb(None, LOGITS, LABELS, 0.25, 0.0)
    np.testing.assert_allclose(got, 0.75 * lambda_0 + 0.25 * lambda_s, rtol=1e-6)
    key = jax.random.key(5)
    lambda_r = perturb(key, LOGITS, LABELS, 0.0, 1.0, 2.0)
    got = perturb(key, LOGITS, LABELS, 0.25, 0.4, 2.0)
    expected = 0.35 * lambda_0 + 0.25 * lambda_s + 0.4 * np.asarray(lambda_r)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    p = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(lambda_s[0], p[0, 0] / (p[0, 0] + p[0, 1]), rtol=1e-6)


def test_loss_by_hand():
    weight = 0.75 * np.array([0.8, 0.3]) + 0.25 * np.array([1 / (1 + np.e), 0.5])
    log_p = np.asarray(jax.nn.log_softmax(LOGITS), np.float64)
    expected = -weight * log_p[[0, 1], [0, 2]] - (1 - weight) * log_p[[0, 1], [1, 2]]
    got = lumix.lumix(r_s=0.25, r_r=0.0)(None, LOGITS, LABELS)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_random_part_is_beta_for_each_example(beta):
    count = 20000
    labels = labels_of(np.zeros(count, int), np.ones(count, int), np.zeros(count))
    w = np.asarray(perturb(jax.random.key(0), jnp.zeros((count, 2)), labels, 0.0, 1.0, beta))
    assert len(np.unique(w)) > count / 4
    assert abs(w.mean() - 0.5) < 0.015
    assert abs(w.var() - 1 / (4 * (2 * beta + 1))) < 0.005


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_shares_it_is_plain_mixing_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(50, 7)), dtype)
    first, second = rng.integers(0, 7, (2, 50))
    labels = labels_of(first, second, rng.random(50))

    def squared(logits, targets):
        return jnp.sum((jax.nn.softmax(logits) - targets) ** 2, axis=-1)

    targets = soft_targets(labels, 7, dtype)
    for base in (None, squared):
        loss = lumix.lumix(base, r_s=0.0, r_r=0.0)
        base = base or optax.softmax_cross_entropy
        for key in (None, jax.random.key(0), jax.random.key(1)):
            np.testing.assert_array_equal(loss(key, logits, labels), base(logits, targets))
    gradient = jax.grad(lambda z: jnp.sum(loss(None, z, labels)))(logits)
    np.testing.assert_array_equal(gradient, jax.grad(lambda z: jnp.sum(base(z, targets)))(logits))


def test_no_gradient_through_the_networks_opinion():
    loss = lumix.lumix(r_s=0.5, r_r=0.0)
    got = jax.grad(lambda z: jnp.sum(loss(None, z, LABELS)))(LOGITS)
    fixed = LABELS._replace(weight=perturb(None, LOGITS, LABELS, 0.5, 0.0))
    # Cross-entropy with constant targets has the gradient p - t.
    expected = jax.nn.softmax(LOGITS) - soft_targets(fixed, 3)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert not jax.grad(lambda z: jnp.sum(perturb(None, z, LABELS, 0.5, 0.0)))(LOGITS).any()


def test_the_networks_opinion_moves_the_weight_towards_it():
    labels = labels_of([0], [1], [0.5])
    for sure, expected in ((9.0, 1.0), (-9.0, 0.0)):
        weight = perturb(None, jnp.array([[sure, 0.0]]), labels, 1.0, 0.0)
        np.testing.assert_allclose(weight, expected, atol=1e-3)


def test_loss_jit_and_vmap_are_eager():
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32)
    labels = labels_of(*rng.integers(0, 5, (2, 3, 6)), rng.random((3, 6)))
    each = [jax.tree.map(lambda x, i=i: x[i], labels) for i in range(3)]
    loss = lumix.lumix(r_s=0.2, r_r=0.3, beta=0.8)
    eager = jnp.stack([loss(keys[i], logits[i], each[i]) for i in range(3)])
    assert eager.shape == (3, 6)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(keys, logits, labels), eager, rtol=1e-5)
    np.testing.assert_array_equal(loss(keys[0], logits[0], each[0]), eager[0])  # the same key
    assert (loss(keys[1], logits[0], each[0]) != eager[0]).any()


def test_shares_can_be_traced():
    traced = jax.jit(lambda r_s, r_r: perturb(KEY, LOGITS, LABELS, r_s, r_r))
    np.testing.assert_array_equal(traced(0.0, 0.0), LABELS.weight)
    expected = perturb(None, LOGITS, LABELS, 0.25, 0.0)
    np.testing.assert_allclose(traced(0.25, 0.0), expected, rtol=1e-6)


def test_known_labels_are_checked_inside_jit():
    closed = jax.jit(lambda z: lumix.lumix(r_s=0.5, r_r=0.0)(None, z, LABELS))
    np.testing.assert_allclose(
        closed(LOGITS), lumix.lumix(r_s=0.5, r_r=0.0)(None, LOGITS, LABELS), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"first.* 2"):
        closed(LOGITS[:, :2])


IMAGES = jnp.zeros((2, 4, 4, 1))
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mix(KEY, IMAGES, jnp.arange(2), mode="blend"), "blend"),
        (lambda: mix(KEY, IMAGES, jnp.arange(2), alpha=0.0), "alpha.* 0.0"),
        (lambda: mix(KEY, IMAGES, jnp.arange(2), alpha=-1), "alpha.* -1"),
        (lambda: mix(KEY, IMAGES, jnp.arange(2), alpha=float("nan")), "alpha.* nan"),
        (lambda: mix(KEY, IMAGES, jnp.arange(2), alpha=jnp.ones(2)), r"alpha.*\(2,\)"),
        (lambda: mix(KEY, IMAGES[:0], jnp.arange(0)), r"\(0, 4, 4, 1\)"),
        (lambda: mix(KEY, IMAGES[0], jnp.arange(2)), r"\(4, 4, 1\)"),
        (lambda: mix(KEY, IMAGES.astype(jnp.uint8), jnp.arange(2)), "uint8"),
        (lambda: mix(KEY, IMAGES, jnp.arange(3)), r"\[2\].*\(3,\)"),
        (lambda: mix(KEY, IMAGES, jnp.ones(2)), "float32"),
        (lambda: lumix.lumix(r_s=-0.1, r_r=0.0), "r_s.*-0.1"),
        (lambda: lumix.lumix(r_s=0.0, r_r=1.5), "r_r.*1.5"),
        (lambda: lumix.lumix(r_s=0.7, r_r=0.4), r"0.7 \+ 0.4"),
        (lambda: lumix.lumix(r_s=jnp.zeros(2), r_r=0.0), r"r_s.*\(2,\)"),
        (lambda: lumix.lumix(beta=0), "beta.* 0"),
        (lambda: perturb(KEY, LOGITS, LABELS, 0.0, 0.1, -2.0), "beta.* -2.0"),
        (lambda: perturb(KEY, LOGITS, LABELS, 2.0, 0.0), "r_s.* 2.0"),
        (lambda: perturb(None, LOGITS, LABELS, 0.0, 0.1), "key.* 0.1"),
        (lambda: perturb(KEY, LOGITS[0], LABELS), r"logits.*\(3,\)"),
        (lambda: perturb(KEY, LOGITS.astype(jnp.int32), LABELS), "logits.*int32"),
        (lambda: perturb(KEY, LOGITS[:1], LABELS), r"2 labels.*\(1, 3\)"),
        (lambda: soft_targets(LABELS, 2), "first.* 0 to 2, .* 0 to 1"),
        (lambda: soft_targets(LABELS, 0), "num_classes.* 0"),
        (lambda: soft_targets(labels_of([0], [-1], [0.5]), 3), "second.* -1"),
        (lambda: soft_targets(labels_of([0, 1], [1], [0.5]), 3), r"\(2,\), \(1,\), \(1,\)"),
        (lambda: soft_targets(labels_of([0], [1], [1.5]), 3), "weight.* 1.5"),
        (lambda: soft_targets(labels_of([0], [1], [-0.5]), 3), "weight.* -0.5"),
        (lambda: soft_targets(labels_of([0], [1], [float("nan")]), 3), "weight.* nan"),
        (lambda: soft_targets(labels_of([0.0], [1], [0.5]), 3), "first.*float32"),
        (lambda: soft_targets(MixedLabels(*jnp.zeros((3, 1), int)), 3), "weight.*int32"),
        (lambda: soft_targets(MixedLabels(*jnp.zeros((2, 0), int), jnp.zeros(0)), 3), "empty"),
        (lambda: lumix.lumix()(KEY, LOGITS[:, :2], LABELS), "first.* 2"),
        (lambda: lumix.lumix()(KEY, LOGITS, LABELS._replace(weight=jnp.full(2, 2.0))), "2.0"),
        (lambda: lumix.lumix(lambda z, t: jnp.mean(z))(KEY, LOGITS, LABELS), r"returned \(\)"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_shapes_are_checked_under_jit_and_values_are_not():
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        jax.jit(lumix.lumix())(KEY, LOGITS[:1], LABELS)
    jax.jit(lumix.lumix())(KEY, LOGITS, LABELS._replace(weight=jnp.full(2, 2.0)))


def test_importing_needs_no_optax():
    code = "import sys, mcjax.lumix; sys.exit('optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
