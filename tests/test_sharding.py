"""Models shared out on meshes of devices, virtual ones of the CPU."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config, small_model, with_tokenizer

import mcjax
from mcjax import sharding
from mcjax.checkpoint import ArtifactReader
from mcjax.compress import compress
from mcjax.generate import generate
from mcjax.models import weights
from mcjax.models.families import describe
from mcjax.parameters import Spread

TESTS = str(Path(__file__).parent)

BEGIN = """
    import json, os, re, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax, jax.numpy as jnp, numpy as np, mcjax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    def mesh_of(*shape):
        names = ("data", "expert", "model")
        count = int(np.prod(shape))
        return jax.make_mesh(
            shape, names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count]
        )
"""


FAMILY = """
    tokens = np.random.default_rng(0).integers(0, 64, (4, 9)).astype(np.int32)
    def logits(model):
        def both(params, tokens, cache):
            apply = lambda *a: model.module.apply({"params": params}, *a)
            first, cache = apply(tokens[:, :8], None, cache)
            more, _ = apply(tokens[:, 8:], jnp.full((4, 1), 8), cache)
            return jnp.concatenate([first, more], axis=1)
        return jax.jit(both)(model.params, tokens, model.module.empty_cache(4, 12))
    planes = {"budget": 1.5} if os.path.exists(f"{sys.argv[1]}/manifest.json") else {}
    expected = logits(mcjax.load(sys.argv[1], **planes))
    for mesh in ((2, 2, 2), (1, 4, 1)) if planes else ((2, 2, 2),):
        model = mcjax.load(sys.argv[1], mesh=mesh_of(*mesh), **planes)
        np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=5e-5)
"""
"""A model's logits on a mesh against those on one device."""


def run(program, *arguments, devices=8):
    """A program in a process that has eight devices, or so many."""
    begin = textwrap.dedent(BEGIN).replace("device_count=8", f"device_count={devices}")
    program = begin + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": TESTS},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def mesh(**axes):
    """A mesh of this process's device alone, its axes as long as they say where it matters."""
    names, devices = tuple(axes), np.array(jax.devices()[:1] * int(np.prod(list(axes.values()))))
    return jax.sharding.Mesh(devices.reshape(tuple(axes.values())), names)


def test_planes_on_a_mesh(artifact):
    """Five experts on four devices; what travels is never a plane."""
    run(
        """
        from mcjax import speculate
        from mcjax.generate import generate
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 300, (4, 10)).astype(np.int32)
        prompts = [tokens[i, : 4 + i].tolist() for i in range(4)]
        one = mcjax.load(sys.argv[1], budget=2.25)
        expected = np.asarray(one(tokens))
        written = np.stack(list(generate(one.module, one.params, prompts, 6)))
        model = mcjax.load(sys.argv[1], budget=2.25, mesh=mesh_of(1, 4, 2))
        np.testing.assert_allclose(model(tokens), expected, atol=2e-5)
        np.testing.assert_array_equal(model.allocation, one.allocation)
        assert model.average_bits == one.average_bits
        np.testing.assert_allclose(model(tokens[:1]), expected[:1], atol=2e-5)
        got = np.stack(list(generate(model.module, model.params, prompts, 6)))
        np.testing.assert_array_equal(got, written)
        draft, tally = speculate.self_draft(model, 1, length=2), speculate.Tally()
        drafted = generate(model.module, model.params, prompts, 6, draft=draft, tally=tally)
        np.testing.assert_array_equal(np.stack(list(drafted)), written)
        alone = speculate.self_draft(one, 1, length=2)
        def exact(draft):  # few rows round otherwise than many
            return draft.module.clone(act_bits=None).apply({"params": draft.params}, tokens)
        np.testing.assert_allclose(exact(draft), exact(alone), atol=2e-5)
        assert tally.drafted > 0

        for precision in {"budget": "350kB"}, {"budget": 2.25}:
            one, model = one.refine(**precision), model.refine(**precision)
            jax.tree.map(np.testing.assert_array_equal, model.widths, one.widths)
            np.testing.assert_allclose(model(tokens), one(tokens), atol=2e-5)

        text = jax.jit(lambda m, t: m(t)).lower(model, tokens).compile().as_text()
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        lines = [l for l in text.splitlines() if re.search(rf"= .* ({kinds})(-start)?\\(", l)]
        found = {re.search(rf" ({kinds})(-start)?\\(", l)[1] for l in lines}
        assert found == {"all-gather", "all-reduce", "all-to-all"}, found
        for line in lines:
            assert not re.search(r"[^s]u(8|32)\\[", line.split("metadata")[0]), line
        for leaf in jax.tree.leaves(model.params["segment_0"]["layer_0"]["block"]["experts"]):
            if leaf.dtype == jnp.uint32:
                assert len({repr(s.index) for s in leaf.addressable_shards}) == 8
        """,
        artifact,
    )


@pytest.mark.parametrize(
    "name", ["deepseek_v3", pytest.param("qwen3_next", marks=pytest.mark.slow)]
)
def test_families_on_a_mesh(name, tmp_path):
    """Latent attention and recurrent states, prefilled into a cache and decoded."""
    run(FAMILY, small_model(tmp_path / "model", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_planes_of_families_on_a_mesh(name, tmp_path, text_file):
    """And in planes, loaded under two meshes from one artifact."""
    model = with_tokenizer(small_model(tmp_path / "model", name), text_file)
    options = dict(max_bits=2, samples=8, seq_len=16, effort="fast")
    compress(model, tmp_path / "out", text_file, **options)
    run(FAMILY, tmp_path / "out")


def test_what_no_axis_divides_is_whole(tmp_path):
    """Experts of an odd width; and networks of which some weights have adapters, others not."""
    routed = small_model(tmp_path / "routed", "qwen3_moe", moe_intermediate_size=29)
    run(
        """
        tokens = np.random.default_rng(0).integers(0, 64, (4, 9)).astype(np.int32)
        for folder in sys.argv[1:]:
            one = mcjax.load(folder)
            many = mcjax.load(folder, mesh=mesh_of(2, 1, 2), rules={"expert": None})
            np.testing.assert_allclose(many(tokens), one(tokens), rtol=1e-4, atol=5e-5)
            for pattern in "gate$", "down$":
                of_model = {"pattern": pattern, "decoder": one.module.decoder}
                adapters = mcjax.lora.init(jax.random.key(0), one.params, rank=2, **of_model)
                adapters = jax.tree.map(lambda a: a + 0.1, adapters)
                expected, got = (
                    jax.jit(model.module.apply)(
                        {"params": mcjax.lora.apply(model.params, adapters)}, tokens
                    )
                    for model in (one, many)
                )
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        """,
        routed,
        small_model(tmp_path / "dense", "llama"),
    )


def test_kernels_lower_on_a_mesh():
    """Those of GPUs and TPUs, which a mesh of a CPU's devices never meets."""
    run(
        """
        from functools import partial
        from test_pallas import random_planes, rows_of
        from mcjax.ops import dp4a, pallas, route, unpack
        planes, devices = random_planes(4, 64, 40, 2, 32), mesh_of(2, 2, 1)
        x, index = rows_of(planes, 40)
        one = lambda x, w, index: x @ unpack.unpack(jax.tree.map(lambda a: a[0], w), jnp.float32)
        functions = {
            "planes_dp4a": lambda x, w, index: dp4a.expert_dots(x, (w,), index)[0],
            "planes_matrix_dot": partial(pallas.grouped_dot, target="gpu"),
            "planes_grouped_dot": partial(pallas.grouped_dot, target="tpu"),
            "planes_unpack": one,
            "route": lambda x, w, index: route.kernel(x[:, :8], 2)[0],
        }
        rows = P(("data", "expert"))
        for name, function in functions.items():
            shared = jax.jit(jax.shard_map(
                function, mesh=devices, in_specs=(rows, P(), rows), out_specs=rows
            ))
            platform = "tpu" if name == "planes_grouped_dot" else "cuda"
            traced = shared.trace(x, planes, index)
            assert name in traced.lower(lowering_platforms=(platform,)).as_text(), name
        """
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_find_their_experts(ragged):
    """However unevenly they are routed, with gradients; rows that are not kept are not sent.

    The CPU lacks the ragged exchange: here it does what its documentation says.
    """
    run(
        """
        from functools import partial
        def exchanged(operand, output, first, going, there, coming, *, axis_name):
            all_of = lambda a: jax.lax.all_gather(a, axis_name)
            mine = jax.lax.axis_index(axis_name)
            rows, first, count, there = map(all_of, (operand, first, going, there))
            n = jnp.arange(len(operand))
            for device in range(len(going)):
                at = there[device, mine] + n
                some = jnp.minimum(count[device, mine], coming[device])
                at = jnp.where(n < some, at, len(output))
                sent = rows[device][jnp.minimum(first[device, mine] + n, len(n) - 1)]
                output = output.at[at].set(sent, mode="drop")
            return output
        if sys.argv[1] == "True":
            jax.lax.ragged_all_to_all = exchanged
            jax.lax.platform_dependent = lambda *values, cpu, default: default(*values)
        from mcjax.ops import Places, exchange, expert_map
        rng, devices = np.random.default_rng(0), mesh_of(1, 4, 1)
        w = rng.normal(size=(8, 6, 5)).astype(np.float32)
        x = rng.normal(size=(32, 6)).astype(np.float32)
        place = rng.permutation(8).astype(np.int32)
        moved = np.zeros_like(w)
        moved[place] = w
        def one(weights, rows):
            return rows @ weights[0]
        def local(w, x, index, keep):
            return expert_map(one, (w,), x.repeat(len(index) // len(x), 0), index, keep, 4)
        def spread(w, place, x, index, keep):
            places = Places(place=place, axis="expert")
            apply = partial(exchange.by_experts, places, partial(local, w), len(w))
            return exchange.total(places, x, apply(x, index, keep))
        rows, same = P("expert"), P()
        def both(along):  # what rows become, and gradients of a loss
            shared = jax.jit(jax.shard_map(
                spread, mesh=devices, in_specs=(rows, same, along, along, along), out_specs=along,
            ))
            loss = lambda *given: jnp.sum(jnp.sin(shared(*given)))
            return shared, jax.jit(jax.grad(loss, (0, 2)))
        mine = jax.grad(lambda *given: jnp.sum(jnp.sin(local(*given))), (0, 1))
        functions = list(map(both, (same, rows)))
        each = [np.full(64, 5), rng.integers(0, 8, 64)]
        for index in each if sys.argv[1] == "False" else each[1:]:
            keep = rng.random(64) < 0.8
            expected = local(w, jnp.asarray(x), index, keep)
            for_w, for_x = mine(jnp.asarray(w), jnp.asarray(x), index, keep)
            for shared, gradient in functions:
                given = moved, place, x, index, keep
                np.testing.assert_allclose(shared(*given), expected, atol=1e-5)
                of_w, of_x = gradient(*given)
                np.testing.assert_allclose(of_w[place], for_w, atol=1e-4)
                np.testing.assert_allclose(of_x, for_x, atol=1e-4)
        traced = gradient.trace(*given)
        for platform, count in ("tpu", 4), ("cuda", 4), ("cpu", 0):
            lowered = traced.lower(lowering_platforms=(platform,)).as_text()
            assert sys.argv[1] == "True" or lowered.count("ragged_all_to_all") == count
        """,
        ragged,
    )


@pytest.mark.slow
def test_devices_share_the_experts_that_are_compressed(model_folder, text_file, artifact, tmp_path):
    """Each has some of them, and the artifact is the same."""
    run(
        """
        from mcjax import quantize_layer
        from mcjax.compress import compress
        usual, used = quantize_layer.quantize, set()
        def quantize(*given, **options):
            made = usual(*given, **options)
            used.update(made.planes.devices())
            return made
        quantize_layer.quantize = quantize
        compress(*sys.argv[1:4], max_bits=3, group_size=32, samples=16, seq_len=64)
        assert len(used) == 2, used
        """,
        model_folder,
        tmp_path / "out",
        text_file,
        devices=2,
    )
    got, expected = (ArtifactReader(path) for path in (tmp_path / "out", artifact))
    for name in ("error", "frequency", "slope"):
        values = (reader.manifest["statistics"][name] for reader in (got, expected))
        np.testing.assert_allclose(*values, rtol=1e-3)
    for i in range(2):
        leaves, wanted = (reader.read_all(f"layers/{i}") for reader in (got, expected))
        for name, leaf in leaves.items():
            if name.endswith(("plane_0", "plane_1", "plane_2")):
                other = np.unpackbits((leaf ^ wanted[name]).view(np.uint8))
                assert other.mean() < 0.01, name


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_places_hold_about_equal_bytes(data):
    experts, devices = data.draw(st.integers(4, 40)), data.draw(st.sampled_from([1, 2, 4, 8]))
    config = small_config("qwen3_moe") | {"num_local_experts": experts, "num_hidden_layers": 6}
    decoder = describe(config | {"num_experts": experts})[1]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    widths = {
        (i, str(role.tap)): rng.choice([1, 2, 3, 4], experts, p=[0.1, 0.5, 0.3, 0.1])
        if role.routed
        else np.array(4)
        for i, layer in enumerate(decoder.layers)
        for role in weights.roles(layer, decoder.width)
        if role.tap is not None
    }
    shared = sharding.resolve(mesh(expert=devices))
    found = sharding.places(decoder, widths, shared)
    each = -(-experts // devices)
    held = np.zeros((devices, 5), int)
    for i, place in found.items():
        assert len(set(place)) == experts and place.min() >= 0 and place.max() < each * devices
        np.add.at(held, (place // each, widths[i, "expert_input"]), 1)
    if experts % devices == 0:  # what a device has room for, beside an even share
        assert (held.max(axis=0) <= -(-held.sum(axis=0) // devices) + 3).all()
    numbers = sorted(found)
    spread = Spread(shared, np.stack([found[i] for i in numbers]))
    wanted = np.stack([widths[i, "expert_input"] for i in numbers])
    room, stack, slot = spread.stacks(wanted)
    for r, e in np.ndindex(wanted.shape):
        at = r, spread.place[r, e]
        assert list(room)[stack[at]] == wanted[r, e] and slot[at] < room[wanted[r, e]]
    where = {
        (p // each, stack[r, p], slot[r, p])
        for r, e in np.ndindex(wanted.shape)
        for p in [spread.place[r, e]]
    }
    assert len(where) == wanted.size


def test_rules():
    shared = sharding.resolve(mesh(data=2, model=1))
    assert (shared.batch, shared.expert, shared.out) == (("data",), None, "model")
    shared = sharding.resolve(mesh(x=2, y=1), {"batch": "x", "expert": "x", "out": None})
    assert (shared.batch, shared.expert, shared.out) == (("x",), "x", None)
    assert [shared.batch_spec(n) for n in (1, 2, 6)] == [None, ("x",), ("x",)]
    for message, rules in [
        (r"rules name \['layer'\]", {"layer": "data"}),
        (r"put 'out' along \['m'\]; the mesh has", {"out": "m"}),
        ("takes one axis", {"expert": ("data", "model")}),
        ("shares other things", {"out": "data"}),
    ]:
        with pytest.raises(ValueError, match=message):
            sharding.resolve(mesh(data=2, model=1), rules)


def test_one_device_is_a_mesh_too(artifact):
    tokens = np.arange(12).reshape(2, 6)
    model = mcjax.load(artifact, budget=2.25, mesh=mesh(data=1, expert=1, model=1))
    adapters = mcjax.lora.init(jax.random.key(0), model.params, rank=2)
    adapted = mcjax.lora.apply(model.params, adapters)
    with pytest.raises(ValueError, match="adapters, whose experts are in their order"):
        model.module.apply({"params": adapted}, tokens)
    np.testing.assert_allclose(model(tokens), mcjax.load(artifact, budget=2.25)(tokens), atol=1e-5)


@pytest.mark.slow
def test_two_processes(artifact, tmp_path):
    """Each reads the experts of its own devices; together they write what one device writes."""
    program = """
        jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[2]))
        from mcjax.generate import generate
        model = mcjax.load(sys.argv[1], budget=2.25, mesh=mesh_of(1, 4, 1))
        logits = model(np.arange(40).reshape(4, 10) % 300)
        for shard in logits.addressable_shards:
            np.save(f"{sys.argv[4]}/{shard.index[0].start}.npy", shard.data)
        prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
        made = list(generate(model.module, model.params, prompts, 4))
        from mcjax.speculate import self_draft
        drafted = generate(model.module, model.params, prompts, 4, draft=self_draft(model, 1))
        np.testing.assert_array_equal(np.stack(list(drafted)), np.stack(made))
        said = [np.stack(made).tolist(), model.bytes_read, model.average_bits]
        for precision in {"budget": 1.5}, {"bits": 3}:
            model = model.refine(**precision)
            logits = model(np.arange(40).reshape(4, 10) % 300)
            for shard in logits.addressable_shards:
                name = f"{model.average_bits:g}_{shard.index[0].start}"
                np.save(f"{sys.argv[4]}/{name}.npy", shard.data)
        print(json.dumps([*said, model.bytes_read]))
    """
    program = textwrap.dedent(BEGIN).replace("=8", "=2") + textwrap.dedent(program)
    port = free_port()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(artifact), str(n), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=300) for process in pair]
    assert not any(process.returncode for process in pair), said[0][1][-2000:] + said[1][1][-2000:]
    one = mcjax.load(artifact, budget=2.25)
    expected = np.asarray(one(np.arange(40).reshape(4, 10) % 300))
    for n in range(4):
        np.testing.assert_allclose(np.load(tmp_path / f"{n}.npy")[0], expected[n], atol=2e-5)
        for precision in {"budget": 1.5}, {"bits": 3}:
            refined = one.refine(**precision)
            got = np.load(tmp_path / f"{refined.average_bits:g}_{n}.npy")[0]
            tokens = np.arange(40).reshape(4, 10) % 300
            np.testing.assert_allclose(got, np.asarray(refined(tokens))[n], atol=2e-5)
    written = generate(one.module, one.params, [[1, 2, 3], [4, 5], [6], [7, 8]], 4)
    written = np.stack(list(written)).tolist()
    found = [json.loads(words.splitlines()[-1]) for words, _ in said]
    assert [each[0] for each in found] == [written, written]
    assert [each[2] for each in found] == [one.average_bits] * 2
    experts = one.expert_bytes_read
    others = one.bytes_read - experts
    assert sum(each[1] for each in found) == experts + 2 * others
    assert max(each[1] for each in found) < 0.65 * experts + others
    more = one.refine(budget=1.5).refine(bits=3)
    assert sum(each[3] - each[1] for each in found) == more.bytes_read - one.bytes_read


def free_port():
    """Of this host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"
