r"""What a model takes on a mesh: bytes of each device, and what travels for each token.

    uv run python benchmarks/mesh.py --out benchmarks/results/mesh_cpu.json
    uv run --with "jax[tpu]" python benchmarks/mesh.py --out FILE.json --ahead

First a small Mixture of Experts on 1, 2, 4 and 8 virtual devices of the CPU: what the arrays of
each device take, what its compiled program sends, and beside both what is predicted; and what a
device holds of one that `train/moe_lm.py` trains. Then the same predictions, by the same functions,
of models that no test machine holds. Predicted bytes are those of the program's own shapes and
shardings; the collectives of a layer follow the formulas of `travels`. With `--ahead` a TPU's
compiler makes the programs that serve such models on slices, and says what they take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import whole
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import mcjax
from mcjax import sharding
from mcjax.bitplane import BitPlanes, MixedPlanes, empty
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.generate import decode
from mcjax.hub import write
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Heads, Routed
from mcjax.models.families import describe
from mcjax.models.language_model import LanguageModel, empty_cache
from mcjax.ops import layout
from mcjax.sampling import Sampling

AXES = ("data", "expert", "model")
SMALL = {
    "model_type": "mixtral",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
}
"""One layer, so that a compiled program shows each collective as often as it happens."""

QWEN3_235B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LARGE = {"Qwen3-235B-A22B": QWEN3_235B, "DeepSeek-V3": DEEPSEEK_V3}


MODELS = {**LARGE, "Qwen3-30B-A3B": whole.QWEN}

AHEAD = [
    ("Qwen3-30B-A3B", ("v5e:4x4", (1, 4, 4), 16, 4096)),
    ("Qwen3-235B-A22B", ("v5e:16x16", (1, 64, 4), 256, 4096)),
    ("DeepSeek-V3", ("v5e:16x16", (1, 64, 4), 256, 4096)),
    ("DeepSeek-V3", ("v6e:8x8", (1, 64, 1), 256, 4096)),
]
"""Models, and the slices, meshes, sequences and tokens for which their decoding is compiled."""


class Machine(NamedTuple):
    """A mesh of devices, by their makers' figures.

    Attributes:
      shape: of the mesh, its axes `AXES`.
      room: bytes of a device's memory.
      memory: bytes a second from it.
      links: bytes a second that reach a device from others.
      batch: sequences that are served at once.
      length: tokens of each.
    """

    shape: tuple[int, int, int]
    room: float
    memory: float
    links: float
    batch: int
    length: int


MACHINES = {
    "v5e-256": Machine((1, 64, 4), 16e9, 819e9, 200e9, 256, 4096),
    "8 H100": Machine((1, 8, 1), 80e9, 3.35e12, 450e9, 32, 4096),
}


def main() -> None:
    """Writes FILE.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--ahead", action="store_true", help="only compile for slices of TPUs, with their libtpu"
    )
    arguments = parser.parse_args()
    flags = os.environ.get("XLA_FLAGS", "")  # JAX reads it when it is first asked for a device
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    if arguments.ahead:
        rows = []
        for name, given in AHEAD:
            rows.append({"model": name, **compiled(describe(MODELS[name])[1], *given)})
            print(json.dumps(rows[-1]), flush=True)
            text = json.dumps({"jax": jax.__version__, "rows": rows}, indent=1)
            arguments.out.write_text(text + "\n")
        return
    facts: dict[str, Any] = {"jax": jax.__version__, "small": measured(), "trained": trained()}
    facts["large"] = []
    for name, config in LARGE.items():
        for named, machine in MACHINES.items():
            mesh = AbstractMesh(machine.shape, AXES, axis_types=(AxisType.Auto,) * 3)
            decoder, shared = describe(config)[1], sharding.resolve(mesh)
            room = machine.batch, machine.length
            taken = predicted(decoder, shared, (2, 3), 4, *room, jnp.bfloat16)
            sent = travels(decoder, shared, 2)
            own = machine.batch / shared.size(*shared.batch)
            read, sending = sum(taken.values()) / machine.memory, own * sum(sent.values())
            row = {"model": name, "machine": named, **machine._asdict(), **taken, "sent": sent}
            row["seconds"] = {"memory": read, "links": sending / machine.links}
            facts["large"].append(row)
            print(json.dumps(row), flush=True)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def measured() -> list[dict[str, Any]]:
    """Bytes of each device and of collectives of a small model, beside what is predicted."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        artifact = small_artifact(Path(directory))
        for shape in [(1, n, 1) for n in (1, 2, 4, 8)] + [(1, 1, n) for n in (2, 4, 8)]:
            mesh = on_devices(shape)
            model = mcjax.load(artifact, bits=2, mesh=mesh)
            batch, length = 8, 64
            cache = model.module.empty_cache(batch, length)
            tokens = np.zeros((batch, length), np.int32)
            compiled = jax.jit(lambda m, t: m(t)).lower(model, tokens).compile()
            shared = model.module.shared
            own = batch * length // shared.size(*shared.batch)
            row = {
                "mesh": shape,
                "weights": of_device(model.params),
                "cache": of_device(cache),
                "activations": compiled.memory_analysis().temp_size_in_bytes,
                "collectives": collectives(compiled.as_text()),
                "predicted": predicted(
                    model.module.decoder, shared, (2,), 4, batch, length, jnp.float32
                ),
                "sent": {k: v * own for k, v in travels(model.module.decoder, shared, 4).items()},
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def on_devices(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    """As many of the virtual devices as a mesh has."""
    types, devices = (AxisType.Auto,) * 3, jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def trained() -> list[dict[str, Any]]:
    """Bytes of each device of a training state, and of temporaries of a step."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    import loop
    import moe_lm
    from recipe import LanguageRecipe

    recipe, rows = LanguageRecipe(model=SMALL, seq_len=64, batch_size=8), []
    row = np.zeros(recipe.seq_len + 1, np.int32)
    each = [(n, 1, 1) for n in (1, 2, 4, 8)] + [(2, 4, 1), (2, 2, 2)]
    for shape in each:
        mesh = on_devices(shape)
        shared = sharding.resolve(mesh, fully=True) if mesh.size > 1 else None
        module = LanguageModel(recipe.decoder, shared=shared)
        optimiser = loop.adamw(
            learning_rate=recipe.learning_rate,
            warmup=recipe.warmup,
            steps=recipe.steps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
        )
        state, _ = moe_lm.begun(recipe, module, optimiser)
        axes = ("data",) if shared is None else shared.batch
        tokens = loop.global_batch(mesh, (recipe.batch_size, row.size), lambda i: row, axes)
        step = moe_lm.make_step(module, recipe, optimiser)
        with jax.set_mesh(mesh):
            compiled = step.lower(state, tokens).compile()
        found = {
            "mesh": shape,
            "parameters": of_device(state.params),
            "moments": of_device(state.optimiser),
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        }
        rows.append(found)
        print(json.dumps(found), flush=True)
    return rows


def small_artifact(directory: Path) -> Path:
    """The small model of random weights as an artifact, with the embedded model's tokenizer."""
    folder = directory / "model"
    folder.mkdir()
    write(folder, SMALL, weights.init(describe(SMALL)[1], jax.random.key(0)))
    (folder / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
    options: dict[str, Any] = {"samples": 8, "seq_len": 128, "effort": "fast"}
    compress(folder, directory / "artifact", EMBEDDED / "calibration.txt", **options)
    return directory / "artifact"


def of_device(tree: Any) -> int:
    """Bytes that the first device holds of arrays."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "u8": 1, "s8": 1}


def collectives(program: str) -> dict[str, int]:
    """Bytes of what each kind of collective of a compiled program gives a device."""
    found: dict[str, int] = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        size = sum(
            SIZES[kind] * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        found[match[2]] = found.get(match[2], 0) + size
    return found


def stacks(rows: int, shape: tuple[int, ...], widths: tuple[int, ...], devices: int) -> Any:
    """Planes of so many weights, as many of each width, rounded up to what devices share evenly."""
    each = -(-rows // (len(widths) * devices)) * devices
    return tuple(empty((each, *shape), k, rotated=True) for k in widths)


def structure(decoder: Decoder, widths: tuple[int, ...], others: int, devices: int) -> Any:
    """Shapes of parameters whose experts so many devices share; see `predicted`."""

    def make():
        params: dict[str, Any] = {}
        for role in weights.rest(decoder):
            weights.put(params, role.path, jnp.zeros(role.shape, jnp.bfloat16))
        for member in weights.members(decoder):
            count = len(member.numbers)
            for role in weights.roles(member.layer, decoder.width):
                if role.routed:
                    experts = -(-role.shape[0] // devices) * devices
                    where = jnp.zeros((count, experts), jnp.int32)
                    held = stacks(count * experts, role.shape[-2:], widths, devices)
                    leaf: Any = MixedPlanes(stacks=held, stack=where, slot=where)
                elif role.tap is not None:
                    leaf = empty((count, *role.shape), others, rotated=True)
                else:
                    leaf = jnp.zeros((count, *role.shape), jnp.bfloat16)
                weights.put(params, member.path + role.path, leaf)
        return params

    return jax.eval_shape(make)


def compiled(
    decoder: Decoder, slice_of: str, shape: tuple[int, int, int], batch: int, length: int
) -> dict[str, Any]:
    """What a TPU's compiler makes of a step of decoding on a slice that is not here.

    Args:
      decoder: the model.
      slice_of: as JAX's topologies name it, such as "v5e:16x16".
      shape: of the mesh, its axes `AXES`.
      batch: sequences.
      length: tokens of each that the cache has room for.
    """
    for name, value in whole.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(slice_of, "tpu").devices
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3
    )
    shared = sharding.resolve(mesh)

    def placed(tree, along):
        def one(leaf, where):
            laid = layout.row_by_row(leaf, where)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=laid)

        return jax.tree.map(one, tree, along)

    def named(specs):
        return jax.tree.map(partial(NamedSharding, mesh), specs)

    params = structure(decoder, (2, 3), 4, shared.size(shared.expert))
    params = placed(params, sharding.shardings(decoder, params, shared))
    along = shared.batch_spec(batch)
    cache = jax.eval_shape(partial(empty_cache, decoder, batch, length, jnp.bfloat16))
    cache = placed(cache, named(sharding.cache_partition(decoder, cache, shared, along)))
    token = jax.ShapeDtypeStruct((batch,), np.int32, sharding=named(PartitionSpec(along)))
    module, start = LanguageModel(decoder, jnp.bfloat16, shared=shared), time.perf_counter()
    with jax.default_device(devices[0]):
        traced = decode.trace(module, params, token, token, cache, None, Sampling())
        made = traced.lower().compile()
    memory, text = made.memory_analysis(), made.as_text()
    return {
        "slice": slice_of,
        "mesh": shape,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": text.count("tpu_custom_call"),
        "ragged_exchanges": text.count("ragged-all-to-all("),
        "seconds_to_compile": time.perf_counter() - start,
    }


def predicted(
    decoder: Decoder,
    shared: sharding.Sharding,
    widths: tuple[int, ...],
    others: int,
    batch: int,
    length: int,
    dtype: Any,
) -> dict[str, int]:
    """Bytes of a device.

    Args:
      decoder: the model.
      shared: the mesh, which may be abstract.
      widths: of experts, as many of each.
      others: width of all other planes.
      batch: sequences.
      length: tokens of each that the cache has room for.
      dtype: of the cache.
    """
    params = structure(decoder, widths, others, shared.size(shared.expert))
    where = sharding.shardings(decoder, params, shared)

    def bytes_of(tree, along):
        each = zip(jax.tree.leaves(tree), jax.tree.leaves(along), strict=True)
        return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in each)

    def planes(leaf):
        return isinstance(leaf, BitPlanes | MixedPlanes)

    split = jax.tree.leaves(params, is_leaf=planes), jax.tree.leaves(where, is_leaf=planes)
    pairs = list(zip(*split, strict=True))
    cache = jax.eval_shape(partial(empty_cache, decoder, batch, length, dtype))
    specs = sharding.cache_partition(decoder, cache, shared, shared.batch_spec(batch))
    of_cache = jax.tree.map(partial(jax.sharding.NamedSharding, shared.mesh), specs)
    return {
        "planes": sum(bytes_of(*pair) for pair in pairs if planes(pair[0])),
        "other weights": sum(bytes_of(*pair) for pair in pairs if not planes(pair[0])),
        "cache": bytes_of(cache, of_cache),
    }


def travels(decoder: Decoder, shared: sharding.Sharding, itemsize: int) -> dict[str, float]:
    """Bytes that collectives give a device, for each token of its own sequences.

    With D features of a token, K experts a token, n devices that share experts and m that share
    output features, each layer of attention gathers the output features of its products, and what
    its heads give where these are shared out,

        (queries, keys and values + H + D) (m - 1) / m,   H = heads x features of a head

    and each layer of experts sends K rows of D there and back, and gathers their hidden and output
    features,

        2 K D (n - 1) / n  +  K (hidden + D) (m - 1) / m

    Args:
      decoder: the model.
      shared: the mesh.
      itemsize: bytes of an activation.
    """
    n, m = shared.size(shared.expert), shared.size(shared.out)
    gathered = exchanged = 0.0
    for layer in decoder.layers:
        for roles in weights.by_tap(layer, decoder.width).values():
            for role in roles:
                if weights.OUT not in role.axes or role.shape[-1] % m:
                    continue
                times = layer.block.routing.top_k if role.routed else 1
                with_gate = role.path[-1] == "up"  # what both make together is gathered
                if not with_gate:
                    gathered += times * role.shape[-1]
        if shared.shares_heads(layer.mixer) and isinstance(layer.mixer, Heads):
            gathered += layer.mixer.heads * layer.mixer.head_dim
        if isinstance(layer.block, Routed):
            exchanged += 2 * layer.block.routing.top_k * decoder.width
    return {
        "gathered": itemsize * gathered * (m - 1) / m,
        "exchanged": itemsize * exchanged * (n - 1) / n,
    }


if __name__ == "__main__":
    main()
