"""Tables tuned against the dense model: by hand with optax, and by the best effort."""

import shutil
from functools import partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CONFIG
from small_models import small_model, with_tokenizer

import mcjax
from mcjax import allocate, checkpoint, compress, schedule, tables, text, tune, tune_artifact
from mcjax.bitplane import BitPlanes
from mcjax.divergence import divergence
from mcjax.hub import Folder
from mcjax.models.families import describe
from mcjax.models.language_model import predict
from mcjax.models.weights import get

COMMON = {"max_bits": 2, "group_size": 32, "samples": 8, "seq_len": 64}


@pytest.fixture(scope="module")
def windows(model_folder, text_file):
    folder = Folder(model_folder)
    tokens = text.encode_file(folder.tokenizer_path, text_file, folder.decoder.vocab_size)
    return text.windows(tokens, 64)


@pytest.fixture(scope="module")
def dense(model_folder):
    return mcjax.load(model_folder)


def arrays(tree):
    return jax.tree.leaves(tree)


def test_what_is_written_is_what_was_applied(artifact, windows):
    model = mcjax.load(artifact, allocation=[[1, 2, 3, 2, 1], [3, 3, 2, 1, 2]])
    tuned = tune.init(model.params, tune.small(model.module.decoder))
    # Nothing trained is nothing changed.
    same = tune.write(model.params, tuned)
    for new, old in zip(arrays(same), arrays(model.params), strict=True):
        assert np.array_equal(new, old)
    key = iter(jax.random.split(jax.random.key(0), 1000))
    moved = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(key), a.shape), tuned)
    run = partial(model.module.apply, tokens=windows[:2])
    applied = run({"params": tune.apply(model.params, moved)})
    written = run({"params": tune.write(model.params, moved)})
    # Norms are bfloat16, which a token whose experts are nearly a tie may take for others.
    assert np.quantile(np.abs(applied - written), 0.9) < 0.01 * np.abs(applied).max()
    assert np.abs(applied - model(windows[:2])).max() > 0.1 * np.abs(applied).max()


def test_training_lowers_the_divergence_and_keeps_the_planes(artifact, dense, windows):
    model = mcjax.load(artifact, bits=1, attention_bits=2)
    tuned = tune.init(model.params, tune.small(model.module.decoder))
    optimiser = optax.adam(1e-2)
    target = dense(windows[:8])
    divergence = partial(tune.divergence, model.module, model.params)

    @jax.jit
    def step(tuned, state):
        value, gradient = jax.value_and_grad(divergence)(tuned, windows[:8], target)
        change, state = optimiser.update(gradient, state, tuned)
        return optax.apply_updates(tuned, change), state, value

    state, values = optimiser.init(tuned), []
    for _ in range(12):
        tuned, state, value = step(tuned, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    held_out = windows[8:16], dense(windows[8:16])
    before = divergence(tune.init(model.params, tune.small(model.module.decoder)), *held_out)
    assert divergence(tuned, *held_out) < 0.9 * before
    written = tune.write(model.params, tuned)
    for old, new in zip(arrays(model.params), arrays(written), strict=True):
        if old.dtype == jnp.uint32:
            assert np.array_equal(old, new)


def test_one_layer_is_dense_at_a_time(artifact, dense, windows):
    """What a scan over layers keeps for the way back is its inputs, and no weight."""
    model = mcjax.load(artifact, allocation=[[1, 2, 3, 2, 1], [3, 3, 2, 1, 2]])
    some = windows[:1, :16]
    target = dense(some)
    loss = partial(tune.divergence, model.module, model.params)
    gradient = jax.value_and_grad(loss)
    program = jax.make_jaxpr(gradient)(tune.init(model.params), some, target)
    kept = list(stacked(program.jaxpr))
    assert len(kept) > 2 and max(map(np.prod, kept)) == 2 * 16 * 96, kept


def stacked(program):
    """Shapes of what scans over this model's two layers stack up but for gradients of tables."""
    for equation in program.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == 2:
            carried = equation.params["num_carry"]
            yield from (v.aval.shape for v in equation.outvars[carried:])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from stacked(inner)


def test_no_bit_is_kept_for_a_gradient():
    planes = mcjax.quantize(jax.random.normal(jax.random.key(0), (64, 32)), 3).slice(3)
    tuned = tune.init({"w": planes})
    _, back = jax.vjp(lambda tuned: tune.apply({"w": planes}, tuned)["w"], tuned)
    assert max(leaf.size for leaf in jax.tree.leaves(back)) < 64 * 32


def test_a_dense_model_has_nothing_to_tune(dense):
    with pytest.raises(ValueError, match="weights are dense, not planes"):
        tune.init(dense.params)


@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_by_layers_are_those_of_the_whole_model(artifact, dense, windows, keeps):
    chosen = [1, 2, 3, 2, 1]
    model = mcjax.load(artifact, allocation=2 * [chosen], attention_bits=3)
    decoder, tokens = dense.module.decoder, windows[:2]
    reader = checkpoint.ArtifactReader(artifact)
    layers = [tune_artifact.read_layer(reader, i) for i in range(2)]
    widths = allocate.of_experts(decoder, reader.manifest, 2 * [chosen], 3)
    turn = schedule.turn_of(decoder, reader.manifest, widths)
    state = tune_artifact.State(layers, [schedule.Setting(2, (3,), 1)], lambda _: [turn])
    state.begin(0)
    by_layers = tune_artifact.Model(decoder, model.params, keeps)
    assert tune_artifact.fits(decoder, state, 2, 64, 1 << 30)
    assert not tune_artifact.fits(decoder, state, 2, 64, 1 << 20)
    head = model.params["head"].astype(jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, decoder.width)), jnp.float32)
    value, got = by_layers.gradients(state, turn, tokens, x, (model.params["norm"], head))

    target = predict(decoder, model.params["norm"], head, x)
    tuned = tune.init(model.params, tune.small(decoder))
    divergence = partial(tune.divergence, model.module, model.params)
    expected, gradient = jax.value_and_grad(divergence)(tuned, tokens, target)
    assert np.allclose(value, expected, rtol=1e-4)
    whole = gradient["tables"]["segment_0/layer_0/mixer/o"]["3"]
    for i in range(2):
        one = got[i][("mixer", "o"), 3]
        for name, change in one.items():
            assert np.abs(change - whole[name][i]).max() < 1e-3 * np.abs(whole[name]).max()
    mine = np.flatnonzero(np.array(chosen) == 2)
    whole = gradient["tables"]["segment_0/layer_0/block/experts/down"]["2"]
    for i in range(2):
        one = got[i][("block", "experts", "down"), 2]
        for name, change in one.items():
            own = whole[name][len(mine) * i : len(mine) * (i + 1)]
            assert np.abs(change[mine] - own).max() < 1e-3 * np.abs(whole[name]).max()
            assert not np.delete(change, mine, axis=0).any()


def test_settings_begin_wide_and_all_else_takes_turns():
    every = schedule.settings(describe(CONFIG)[1], (1, 2, 3, 4), (2, 3, 4, 8), 4)
    assert [(s.budgeted, s.others) for s in every] == [
        (4, (4,)),
        (3, (4, 3)),
        (2, (4, 2)),
        (1, (4,)),
        (None, (4,)),
    ]
    assert all(1 < b < 4 for b in every[-1].budgets) and len(every[-1].budgets) > 5
    assert not schedule.settings(describe(CONFIG)[1], (1,), (2, 3, 4, 8), 4)[-1].budgets


def test_budgets_take_turns_as_they_are_served(artifact):
    reader = checkpoint.ArtifactReader(artifact)
    setting = schedule.Setting(None, (4,), 8, (1.5, 2.5))
    every = schedule.turns(reader.decoder, reader.manifest, setting)
    pairs = {
        (int(t.widths[0]["block", "experts", "up"].max()), int(t.widths[0]["mixer", "o"]))
        for t in every[:-2]
    }
    assert pairs == {(1, 4), (2, 4), (2, 2), (3, 4), (3, 3)} and len(every) == 7
    for budget, turn in zip((1.5, 2.5), every[-2:], strict=True):
        model = mcjax.load(artifact, budget=budget)
        for (i, tap), widths in model.widths.items():
            name = {"expert_input": "gate", "expert_hidden": "down"}.get(tap)
            if name is not None:
                got = turn.widths[i]["block", "experts", name]
                np.testing.assert_array_equal(got, widths)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_steps_and_offsets_move_a_weight_as_far(width):
    w = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
    planes = mcjax.quantize(w, 4, 128).slice(width)
    table = tables.to_parameters(planes.tables[0])

    def size(name):
        other = table | {name: table[name] + tune.table_rates(0.5, width)[name]}
        change = planes.values(*tables.decode_parameters(other, width)) - values
        return float(np.sqrt(np.mean(change**2)))

    values = planes.values(*tables.decode_parameters(table, width))
    assert 0.6 < size("offset") / size("steps") < 1.4


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_state_is_restored_between_settings_too(artifact, step, tmp_path):
    reader = checkpoint.ArtifactReader(artifact)
    layers = [tune_artifact.read_layer(reader, i) for i in range(2)]
    every = [schedule.Setting(k, others, 2) for k, others in ((3, (4, 3)), (1, (4,)))]
    every.append(schedule.Setting(None, (4,), 2, (1.5,)))
    turns_of = partial(schedule.turns, reader.decoder, reader.manifest)

    def state(steps):
        made = tune_artifact.State(layers, every, turns_of)
        for n in range(steps):
            if n % 2 == 0:
                made.begin(n // 2)
            gradients = [
                {key: jax.tree.map(jnp.sin, tables[key]) for key in moments}
                for tables, moments in zip(made.tables, made.moments, strict=True)
            ]
            made.update(gradients, 0.1, made.turns[-1])
            if n % 2 == 1:
                made.end()
        return made

    saved, restored = state(step), tune_artifact.State(layers, every, turns_of)
    saved.save(tmp_path / "state.npz", step)
    assert restored.restore(tmp_path / "state.npz") == step
    assert (restored.number, restored.done) == (saved.number, saved.done)
    for name in ("tables", "moments"):
        jax.tree.map(
            np.testing.assert_array_equal, *map(arrays, map(attrgetter(name), (restored, saved)))
        )


class Stopped(Exception):
    """Of a run that is killed."""


def stops(after):
    """A progress bar that kills the tuning of budgets after so many steps."""

    def progress(items, description):
        for n, item in enumerate(items):
            if description == "tuning budgets" and n == after:
                raise Stopped
            yield item

    return progress


def leaves_of(path):
    reader = checkpoint.ArtifactReader(path)
    return {
        (i, name): leaf for i in range(2) for name, leaf in reader.read_all(f"layers/{i}").items()
    }


def test_the_best_effort(model_folder, text_file, dense, windows, tmp_path, monkeypatch):
    """It keeps planes, lowers divergence at every width, and resumes where it was killed."""
    monkeypatch.setattr(schedule, "STEPS", {1: 6})
    monkeypatch.setattr(schedule, "MIXED_STEPS", 6)
    monkeypatch.setattr(tune, "RATES", {1: 2e-2})
    monkeypatch.setattr(schedule, "MOST_TIMES", 1)
    monkeypatch.setattr(schedule, "STEP_TOKENS", 1024)
    monkeypatch.setattr(tune_artifact, "KEEP_EVERY", 4)
    given = model_folder, tmp_path / "best", text_file
    with pytest.raises(Stopped):
        compress.compress(*given, **COMMON, effort="best", resume=True, progress=stops(3))
    assert not (tmp_path / "best").exists()
    (tmp_path / ".best.partial").rename(tmp_path / "normal")
    shutil.copytree(tmp_path / "normal", tmp_path / ".best.partial")
    compress.compress(*given, **COMMON, effort="best", resume=True)
    assert not list(tmp_path.glob(".*"))
    compress.compress(model_folder, tmp_path / "again", text_file, **COMMON, effort="best")

    best, again, normal = (leaves_of(tmp_path / name) for name in ("best", "again", "normal"))
    factors = {name: leaf for name, leaf in best.items() if "factor" in name[1]}
    assert {name for _, name in factors} == {
        f"{role}.factor_{k}"
        for role in ("mixer_norm", "block_norm", "block.router")
        for k in (1, 2)
    }
    assert all(np.abs(leaf.astype(np.float32)).max() > 1e-3 for leaf in factors.values())
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names == {"layers", "manifest.json", "rest", "tokenizer.json"}
    moved = set()
    for (i, name), leaf in best.items():
        assert np.array_equal(leaf, again[i, name]), name
        if "factor" not in name and not np.array_equal(leaf, normal[i, name]):
            moved.add(name.split(".")[-1])
    assert moved == {"table_1", "table_2", "table_4"}  # attention's other widths are not trained

    target = dense(windows)
    for budget, share in ((1, 0.95), (1.5, 0.97), (2, 1.05)):
        loss = {}
        for name in ("best", "normal"):
            model = mcjax.load(tmp_path / name, budget=budget)
            tuned = tune.init(model.params, tune.small(model.module.decoder))
            loss[name] = tune.divergence(model.module, model.params, tuned, windows, target)
        assert loss["best"] < share * loss["normal"], budget


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3"])
def test_the_best_effort_of_other_families(name, text_file, tmp_path, monkeypatch):
    """A dense layer before routed ones, and no routed ones at all."""
    monkeypatch.setattr(schedule, "STEPS", {1: 6})
    monkeypatch.setattr(schedule, "MIXED_STEPS", 6)
    monkeypatch.setattr(schedule, "MOST_TIMES", 1)
    folder = with_tokenizer(small_model(tmp_path / "model", name), text_file)
    options = dict(max_bits=2, samples=8, seq_len=16)
    for effort in ("normal", "best"):
        compress.compress(folder, tmp_path / effort, text_file, **options, effort=effort)
    whole = mcjax.load(folder)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16))
    for budget in (1, 1.5, 2):
        found = [
            divergence(whole(tokens), mcjax.load(tmp_path / effort, budget=budget)(tokens))
            for effort in ("best", "normal")
        ]
        assert found[0] < 1.02 * found[1], (budget, found)


def test_norms_and_routers_follow_the_average_width(artifact, tmp_path):
    """Those of the width next to a layer's average are served, and after refining too."""
    reader, rng = checkpoint.ArtifactReader(artifact), np.random.default_rng(0)
    manifest, out = dict(reader.manifest), tmp_path / "tuned"
    shutil.copytree(artifact, out)
    shutil.rmtree(out / "layers")
    (out / "layers").mkdir()
    sums, factors, extra = dict(manifest["checksums"]), {}, 0
    for i in range(2):
        for name, size in (("mixer_norm", 96), ("block_norm", 96), ("block.router", 5)):
            for k in (1, 2, 3):
                factors[i, f"{name}.factor_{k}"] = rng.normal(size=size).astype(jnp.bfloat16)
                extra += 2 * size if k == 1 else 0
        leaves = reader.read_all(f"layers/{i}")
        leaves |= {name: value for (own, name), value in factors.items() if own == i}
        sums[f"layers/{i}"] = checkpoint.save_tree(
            out / "layers" / str(i), leaves, checkpoint.BY_EXPERT
        )
    checkpoint.write_manifest(out, {**manifest, "checksums": sums, "tuning": {}})

    def check(model, plain, widths):
        for name in (("mixer_norm",), ("block_norm",), ("block", "router")):
            path = ("segment_0", "layer_0", *name)
            own, before = (np.asarray(get(m.params, path), np.float32) for m in (model, plain))
            for i, k in enumerate(widths):
                factor = 1 + factors[i, f"{'.'.join(name)}.factor_{k}"].astype(np.float32)
                assert np.allclose(own[i], before[i] * factor, rtol=1e-2)

    plain = mcjax.load(artifact, bits=1)
    model = mcjax.load(out, allocation=[[1, 1, 1, 1, 2], [3, 3, 2, 2, 3]])
    check(model, plain, (1, 3))
    assert model.bytes_read - mcjax.load(artifact, allocation=model.allocation).bytes_read == extra
    for allocation, widths in (([[2] * 5, [3] * 5], (2, 3)), ([[2] * 5, [1] * 5], (2, 1))):
        model = model.refine(allocation=allocation)
        check(model, plain, widths)


def test_planes_are_a_weight_with_other_numbers():
    w = jax.random.normal(jax.random.key(0), (70, 9))
    planes = mcjax.quantize(w, 3, rotated=True)
    from mcjax import tables

    alpha, offset = tables.decode(planes.tables[-1], 3)
    assert isinstance(planes, BitPlanes)
    assert np.allclose(planes.values(alpha, offset), planes.dequantize(), atol=1e-6)
    assert np.allclose(planes.values(2 * alpha, 2 * offset), 2 * planes.dequantize(), atol=1e-5)


def test_saved_without_what_another_was_measured_at(artifact, tmp_path):
    """And with nothing trained it reads as before."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(artifact, before)
    (before / checkpoint.MEASURED).write_text("{}\n")
    model = mcjax.load(before, bits=2)
    tune.save(model, tune.init(model.params, ()), after, {})
    assert not (after / checkpoint.MEASURED).exists()
    jax.tree.map(np.testing.assert_array_equal, mcjax.load(after, bits=2).params, model.params)
