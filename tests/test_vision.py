"""The image recipe: resuming equals not stopping, what is served is what was trained, bad input."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import data_sources
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import vision
import vision_step
from recipe import VisionRecipe

from mcjax.checkpoint import ArtifactReader

TRAIN = Path(__file__).parent.parent / "train"
RECIPE = VisionRecipe(
    model="resnet",
    model_fields={"blocks": (1,), "channels": 8},
    pad=1,
    flip=True,
    widths=(4, 1),
    distill=0.5,
    learning_rate=0.05,
    batch_size=8,
    steps=6,
    save_every=2,
    log_every=2,
    evaluate_every=6,
)
PLAIN = dataclasses.replace(RECIPE, widths=(), accumulation=2)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_npz(path, **changes):
    """Bright and dark images of 8x8."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 21)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 120, (count, 8, 8, 1)) + 130 * labels[:, None, None, None]
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return f"npz:{path}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return dataclasses.replace(RECIPE, dataset=write_npz(folder / "two.npz"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe):
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, vision.train(recipe, out)


def test_exports_what_it_trained(trained):
    out, result = trained
    assert set(result) == {"accuracy"} and list(result["accuracy"]) == ["4", "1"]
    names = {p.name for p in out.iterdir()}
    assert {"model", "metrics.csv", "accuracy.png", "checkpoints", "recipe.json"} == names
    header, *rows = (out / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["2", "4", "6"]
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    # While training weights are only made to look quantised; in `model` they are planes.
    for bits, value in result["accuracy"].items():
        assert float(last[f"accuracy_{bits}"]) == pytest.approx(value)
    assert result["accuracy"]["4"] > 0.8


def test_loads_one_width(trained, monkeypatch):
    out, _ = trained
    read = []
    original = ArtifactReader.read
    monkeypatch.setattr(
        ArtifactReader, "read", lambda self, r: original(self, read.extend(r := [*r]) or r)
    )
    module, variables = vision.load(out / "model", 1)
    assert not any("plane_1" in name or "table_4" in name for _, name, _ in read)
    assert variables["params"]["stage_0_block_0"]["conv_1"]["kernel"].bits == 1
    assert module.bits == 1
    with pytest.raises(ValueError, match=r"bits 3 is not one of the widths \(4, 1\)"):
        vision.load(out / "model", 3)
    with pytest.raises(ValueError, match="has the widths"):
        vision.load(out / "model", None)


@pytest.mark.parametrize("how", ["crash", "signal"])
def test_resuming_equals_not_stopping(trained, recipe, tmp_path, monkeypatch, how):
    out = tmp_path / "run"
    row = data_sources.Rows.row

    def interrupted(self, step, i):
        if step == 3:
            if how == "crash":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return row(self, step, i)

    monkeypatch.setattr(data_sources.Rows, "row", interrupted)
    # The batch is made while the step before it runs.
    with pytest.raises((RuntimeError, KeyboardInterrupt), match=r"power cut|stopped at step [34]"):
        vision.train(recipe, out)
    assert not (out / "model").exists()
    monkeypatch.undo()
    result = vision.train(recipe, out, resume=True)
    assert result == trained[1]
    for bits in (4, 1):
        same(*(vision.load(run / "model", bits)[1] for run in (out, trained[0])))


def take_step(recipe, images):
    """Metrics of one step, and the sums of the statistics after it."""
    mesh = vision.data_mesh()
    module = recipe.module(2)
    variables = module.init(jax.random.key(0), vision_step.normalise(images[:1]))
    params = variables["params"]
    optimiser, objective = vision_step.make_optimiser(recipe, 2), vision_step.make_objective(recipe)
    extra = vision_step.initial_extra(recipe, objective, variables)
    state = loop.State(jnp.zeros((), jnp.int32), params, optimiser.init(params), extra)
    batch = (
        loop.global_batch(mesh, images.shape, lambda i: images[i]),
        loop.global_batch(mesh, images.shape[:1], lambda i: np.int32(i % 2)),
    )
    assert len(batch[0].addressable_shards) == jax.device_count()
    state, metrics = vision_step.make_step(module, recipe, optimiser, objective)(state, batch)
    stats = jax.tree.leaves(state.extra["batch_stats"])
    return {k: float(v) for k, v in metrics.items()}, [float(jnp.abs(x).sum()) for x in stats]


def pixels():
    return np.random.default_rng(0).integers(0, 255, (8, 8, 8, 1)).astype(np.uint8)


def test_gradients_of_least_norm():
    own = {"mixing": "cutmix", "r_s": 0.2, "r_r": 0.1, "accumulation": 2}
    recipe = dataclasses.replace(RECIPE, objective="mgda", **own)
    metrics, _ = take_step(recipe, pixels())
    assert metrics["weight_4"] + metrics["weight_1"] == pytest.approx(1)
    assert metrics["loss"] == pytest.approx((metrics["loss_4"] + metrics["loss_1"]) / 2)


def test_two_devices_equal_one():
    """The same step to float tolerance, batch normalisation and all."""
    script = f"""
import sys; sys.path[:0] = [{str(TRAIN)!r}, {str(Path(__file__).parent)!r}]
import json, jax, test_vision as t
assert jax.device_count() == 2
print(json.dumps(t.take_step(t.PLAIN, t.pixels())))
"""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert run.returncode == 0, run.stderr
    one, two = take_step(PLAIN, pixels()), json.loads(run.stdout)
    assert two[0] == pytest.approx(one[0], rel=2e-4)
    assert two[1] == pytest.approx(one[1], rel=2e-4)


def test_losses_by_hand(recipe):
    """Equal logits cost log C at every width, whatever the labels, mixed or not."""
    module = recipe.module(2)
    images, labels = jnp.ones((4, 8, 8, 1)), jnp.array([0, 1, 0, 1])
    variables = module.init(jax.random.key(0), images)
    params = {
        **variables["params"],
        "head": jax.tree.map(jnp.zeros_like, variables["params"]["head"]),
    }
    for mixing in ("none", "mixup"):
        own = dataclasses.replace(recipe, mixing=mixing)
        given = labels
        if mixing != "none":
            given = vision_step.lumix.MixedLabels(labels, labels[::-1], jnp.full(4, 0.3))
        values, (_, stats) = vision_step.losses(
            module, own, params, variables["batch_stats"], images, given, jax.random.key(1)
        )
        np.testing.assert_allclose(values, [np.log(2)] * 2, rtol=1e-6)
        changed = stats["stem_norm"]["mean"] != variables["batch_stats"]["stem_norm"]["mean"]
        assert changed.any(-1).tolist() == [False, True, True]  # float, 4 and 1 bits


SAMPLED = dataclasses.replace(RECIPE, widths=(4, 2, 1), sampled=1, save_every=1, log_every=1)


@pytest.mark.parametrize("chosen", [(0, 2), (0, 1, 2), (1,)])
def test_sampled_widths_equal_the_objective_of_these_alone(chosen):
    """Gradient, losses and statistics, with distillation from the next higher of those chosen."""
    recipe = dataclasses.replace(SAMPLED, weights=(1.0, 2.0, 3.0))
    module = recipe.module(2)
    images, labels = vision_step.normalise(pixels()), jnp.arange(8) % 2
    variables = module.init(jax.random.key(0), images)
    params, stats = variables["params"], variables["batch_stats"]
    fixed = (module, recipe)
    key = jax.random.key(1)

    def losses_at(params, stats, widths, teacher):
        return vision_step.losses(*fixed, params, stats, images, labels, key, widths, teacher)

    weights = jnp.array(recipe.weights)
    gradient, values, new = jax.jit(
        lambda index: vision_step.sampled_gradient(
            losses_at, params, stats, recipe.widths, index, weights, jnp.zeros((8, 2))
        )
    )(jnp.array(chosen))

    mine = [recipe.widths[i] for i in chosen]
    objective = vision_step.qat.fixed([recipe.weights[i] for i in chosen])
    wanted, losses, (_, kept), _, _ = jax.jit(
        lambda params: vision_step.qat.combine(
            lambda p: losses_at(p, stats, mine, None), params, objective, objective.init(len(mine))
        )
    )(params)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (gradient, values, new), (wanted, losses, kept))
    moved = np.any(new["stem_norm"]["mean"] != stats["stem_norm"]["mean"], axis=-1)
    assert moved.tolist() == [False, *(i in chosen for i in range(3))]  # the first row is float


def test_sampled_widths_train_and_resume(recipe, tmp_path, monkeypatch):
    own = dataclasses.replace(SAMPLED, dataset=recipe.dataset, sampled=1, steps=8)
    wanted = vision.train(own, tmp_path / "whole")
    header, *rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    changed = set()
    for before, now in itertools.pairwise(table):
        differ = [k for k in ("4", "2", "1") if before[f"loss_{k}"] != now[f"loss_{k}"]]
        assert len(differ) == 1 and now["loss"] == now[f"loss_{differ[0]}"]  # only what it trained
        changed |= {*differ}
    assert len(changed) > 1
    assert wanted["accuracy"]["1"] > 0.8

    row = data_sources.Rows.row

    def interrupted(self, step, i):
        if step == 4:
            raise RuntimeError("power cut")
        return row(self, step, i)

    monkeypatch.setattr(data_sources.Rows, "row", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        vision.train(own, tmp_path / "cut")
    monkeypatch.undo()
    assert vision.train(own, tmp_path / "cut", resume=True) == wanted
    same(*(vision.load(tmp_path / run / "model", 1)[1] for run in ("whole", "cut")))


def test_rows_are_pure_and_cover_an_epoch(recipe):
    source = data_sources.open_dataset(recipe.dataset).train
    rows = data_sources.Rows(source, data_sources.Augment(pad=1, mirror=True), 8, seed=3)
    again = data_sources.Rows(source, data_sources.Augment(pad=1, mirror=True), 8, seed=3)
    for step, i in ((7, 5), (0, 0), (7, 5)):
        same(rows.row(step, i), again.row(step, i))
    numbered = data_sources.Rows(
        [(np.full((1, 1, 1), n), n) for n in range(40)], data_sources.Augment(), 8, seed=3
    )
    epochs = [
        [numbered.row(step, i)[1] for step in range(e, e + 5) for i in range(8)] for e in (0, 5)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]


def test_augmentation():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    seen = {
        data_sources.Augment(mirror=True)(np.random.default_rng(s), image).tobytes()
        for s in range(9)
    }
    assert seen == {image.tobytes(), image[:, ::-1].tobytes()}
    shifted = data_sources.Augment(pad=2)
    seen = [shifted(np.random.default_rng(s), image) for s in range(60)]
    assert {x.shape for x in seen} == {image.shape}
    assert len({x.tobytes() for x in seen}) > 15
    assert any((x == image).all() for x in seen)
    wide = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 1))
    part = data_sources.random_part(np.random.default_rng(0), wide, 16)
    assert part.shape == (16, 16, 1) and (np.diff(part[0, :, 0].astype(int)) >= 0).all()
    middle = data_sources.centre(wide, 14)
    assert middle.shape == (14, 14, 1)
    np.testing.assert_allclose(middle.mean(), 31.5, atol=0.6)


def test_aupr_by_hand():
    assert vision.aupr(np.array([0.9, 0.8]), np.array([0.1, 0.2])) == 1
    # Descending anomaly: out, in, out, in. Precision 1 at recall 1/2 and 2/3 at recall 1.
    assert vision.aupr(np.array([0.2, 0.4]), np.array([0.1, 0.3])) == pytest.approx(5 / 6)
    assert vision.aupr(np.full(30, 0.5), np.full(10, 0.5)) == pytest.approx(0.25)
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 20, 100) / 20, rng.integers(0, 15, 40) / 20
    wanted = sklearn.average_precision_score([0] * 100 + [1] * 40, -np.append(inside, outside))
    assert vision.aupr(inside, outside) == pytest.approx(wanted)


def test_shifted_and_outliers(recipe, tmp_path, capsys):
    from PIL import Image

    for name in ("0", "1"):
        (tmp_path / "out" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "out" / name / "a.png")
    dataset = data_sources.open_dataset(recipe.dataset)
    grey = lambda x: jnp.mean(x, axis=(1, 2, 3))  # noqa: E731
    predictors = {"4": lambda x: jnp.stack([-grey(x), grey(x)], 1)}
    own = dataclasses.replace(
        recipe,
        shifted=(recipe.dataset,),
        outliers=(f"folder:{tmp_path / 'out'}", "folder:nowhere"),
    )
    result = vision.robustness(predictors, own, dataset)
    assert result["shifted"] == {recipe.dataset: {"4": 1.0}}
    assert result["outliers"][own.outliers[0]]["4"] < 0.2  # black is surely dark
    assert "left out: nowhere holds no JPEG" in capsys.readouterr().err
    _, _, labels = vision.judge([predictors["4"]], recipe, dataset.test)
    only, _, _ = vision.judge([predictors["4"]], recipe, dataset.test, np.array([1]))
    assert (only == 1).all() and len(labels) == 21


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cifar10", {"pad": 4, "widths": (), "dtype": "bfloat16"}),
        (
            "imagenet2012",
            {
                "image_size": 16,
                "shifted": ("tfds:imagenet_a",),
                "widths": (),
                "objective": "uncertainty",
                "mixing": "mixup",
                "optimiser": "adamw",
                "warmup": 1,
            },
        ),
    ],
)
def test_trains_on_tfds(tmp_path, name, fields):
    tfds = pytest.importorskip("tensorflow_datasets")
    form = "imagenet" if name == "imagenet2012" else "cifar"
    recipe = dataclasses.replace(
        RECIPE,
        dataset=f"tfds:{name}",
        model_fields={"blocks": (1,), "channels": 8, "form": form},
        **{"pad": 0, "steps": 2, "evaluate_every": 2} | fields,
    )
    with tfds.testing.mock_data(num_examples=12):
        result = vision.train(recipe, tmp_path / "run")
    assert list(result["accuracy"]) == ["float"]
    assert ("shifted" in result) == (form == "imagenet")
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert ("weight_float" in header) == (recipe.objective != "fixed")


def test_digits_are_a_tfds_dataset(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    litter = tmp_path / "temporary"
    litter.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(litter))
    dataset = data_sources.open_dataset("digits", tmp_path)
    assert (len(dataset.train), len(dataset.test), len(dataset.names)) == (1437, 360, 10)
    image, label = dataset.train[7]
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8 and image.max() == 240
    assert 0 <= label < 10 and not dataset.mirror
    again = data_sources.open_dataset("digits", tmp_path)
    same(again.train[7], (image, label))
    with pytest.raises(ValueError, match="cannot open tfds:no_such"):
        data_sources.open_dataset("tfds:no_such")
    assert list(litter.iterdir()) == [] and tempfile.tempdir == str(litter)


def test_configs_are_sound():
    for path in sorted((TRAIN / "configs").glob("*.py")):
        if not path.name.startswith("moe_"):
            recipe = loop.load_recipe(path, VisionRecipe)
            assert json.loads(json.dumps(recipe.to_dict()))["model"] == recipe.model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "resnet21"}, "model must be one of .*, got 'resnet21'"),
        ({"model_fields": {"blocks": (1,)}}, "channels"),
        ({"model_fields": {"blocks": (1,), "channels": 8, "depth": 3}}, "depth"),
        ({"widths": (1, 4)}, r"descend.*\(1, 4\)"),
        ({"objective": "sum"}, "'sum'"),
        ({"mixing": "none", "r_s": 0.1}, "r_s 0.1"),
        ({"mixing": "mixup", "r_s": 0.6, "r_r": 0.6}, "0.6"),
        ({"distill": 1.5}, "distill must be 0 to 1, got 1.5"),
        ({"epochs": 2}, "either epochs or steps, got 2 and 6"),
        ({"accumulation": 3}, "8 cannot be cut into 3"),
        ({"weights": (1.0,)}, r"\(1.0,\)"),
        ({"sampled": 3}, r"sampled must be .* got 3 of \(4, 1\)"),
        ({"sampled": 0}, "got 0"),
        ({"sampled": 1.5}, r"got 1\.5"),
        ({"sampled": 1, "widths": ()}, r"got 1 of \(\)"),
        ({"sampled": 2, "objective": "mgda"}, "sampled 2 needs the objective fixed.*got mgda"),
        ({"sampled": 2, "objective": "uncertainty"}, "sampled 2 needs .*got uncertainty"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
    ],
)
def test_bad_recipes(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(RECIPE, **change)


def test_bad_input(tmp_path, trained, recipe, capsys, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_vision import RECIPE as recipe"
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))

    def run(*arguments):
        arguments = ("--config", config, *arguments)
        monkeypatch.setattr(sys, "argv", ["vision", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            loop.program(vision.main, "vision")
        assert status.value.code == 1
        output = capsys.readouterr()
        assert not output.out
        assert output.err.startswith("vision: error: ") and output.err.count("\n") == 1
        return output.err

    out = ("--out", tmp_path / "new")
    dataset = recipe.dataset

    def npz(**changes):
        return run(*out, "--dataset", write_npz(tmp_path / "bad.npz", **changes))

    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
    assert "it has no test_labels" in npz(test_labels=None)
    assert "uint8 [N, H, W, C], got float64" in npz(train_images=images / 2, train_labels=labels)
    assert "uint8 (4, 8, 8)" in npz(train_images=images[..., 0], train_labels=labels)
    assert "int [4], got int64 (2,)" in npz(train_images=images, train_labels=labels[:2])
    assert "got float64" in npz(train_images=images, train_labels=labels / 2)
    assert "not be negative, got -1" in npz(train_images=images, train_labels=labels - 1)
    assert "test_labels reach 4" in npz(test_images=images, test_labels=labels + 3)
    assert "hold nothing" in npz(test_images=images[:0], test_labels=labels[:0])
    assert "(8, 8, 3)" in npz(test_images=np.repeat(images, 3, -1), test_labels=labels)
    assert "one class" in npz(train_labels=np.zeros(40, int))
    assert "cannot use the dataset" in npz(train_labels=np.array([None] * 40))
    (tmp_path / "text.npz").write_text("not a zip file")
    assert "cannot use the dataset" in run(*out, "--dataset", f"npz:{tmp_path / 'text.npz'}")
    assert "cannot use the dataset" in run(*out, "--dataset", f"npz:{tmp_path / 'none.npz'}")
    assert "dataset must be digits" in run(*out, "--dataset", "mnist")
    assert "cannot open tfds:no_such" in run(*out, "--dataset", "tfds:no_such")
    assert "not prepared" in run(*out, "--dataset", "tfds:cifar10")
    assert "exists" in run("--out", trained[0], "--dataset", dataset)
    resume = ("--out", trained[0], "--resume", "--dataset", dataset)
    assert "was trained with steps 6, not 9" in run(*resume, "--steps", 9)
    assert "steps must be positive, got 0" in run(*out, "--steps", 0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert "digits needs scikit-learn: pip install 'mcjax[train]'" in run(*out)
    assert not (tmp_path / "new").exists()
