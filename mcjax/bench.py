"""Times of products, decoding, prefill and loading beside what a user would pick instead.

All figures are medians over repetitions in which the candidates take turns, so that a machine's
moods meet all of them. Speeds are ratios within one run; every product carries its error.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import bitplane, serving
from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.generate import decode, prefill
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.families import describe
from mcjax.models.language_model import LanguageModel
from mcjax.ops import device, dot, expert_dot, layout
from mcjax.sampling import Sampling

SHAPE = (4096, 14336)
"""d_in, d_out of the products: up and gate of a Mixtral-8x7B expert."""

MOE: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""config.json of the model that decoding and prefill are timed on: 195 million parameters, random
ones."""

BUDGET = 2
_PROMPT = 512


def bench(
    repeats: int = 11, progress: Callable[..., Any] = lambda items, **_: items
) -> dict[str, Any]:
    """Everything that `mcjax bench` reports.

    Args:
      repeats: of every measurement, beside two to warm up.
      progress: wraps the iteration over the parts.

    Returns:
      `machine`; `products`, `experts`, `decode`, `prefill` and `load`, lists of rows with `name`,
      `ms` (median), `spread_ms` (lower and upper quartile) and `speedup`, over the first row.

    Raises:
      ValueError: if `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    parts = {
        "products": products,
        "experts": experts,
        "decode": decoding,
        "prefill": prefilling,
        "load": loading,
    }
    facts: dict[str, Any] = {"machine": machine()}
    for name in progress(list(parts), description="bench"):
        facts[name] = parts[name](repeats)
    return facts


def machine() -> dict[str, Any]:
    """Device, versions, and the bandwidth of adding one array to another, in GB/s.

    The arrays have 128 MB, and 1 GB where that would take no longer than to ask for it.
    """
    size = (32 if device.platform() == "cpu" else 256) << 20
    source, target = jnp.ones(size, jnp.float32), jnp.zeros(size, jnp.float32)
    add = jax.jit(lambda a, b: b + a, donate_argnums=1)  # into a buffer that is mapped already
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target = jax.block_until_ready(add(source, target))
        seconds.append(time.perf_counter() - start)
    packages = ("jax", "jaxlib", "flax", "numpy", "torch")
    return {
        "device": jax.devices()[0].device_kind,
        "platform": device.first().platform,
        "processor": _processor(),
        "bandwidth_gb_s": 3 * source.nbytes / float(np.median(seconds)) / 1e9,
        "versions": {p: version(p) for p in packages if importlib.util.find_spec(p)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor()


def timed(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, at_once: bool = False, **facts: Any
) -> list[dict[str, Any]]:
    """Times functions without arguments, taking turns; the first is what others are compared to.

    Args:
      candidates: name -> function; what it returns is waited for.
      repeats: how often each is timed.
      at_once: run each once more right before it is timed, so that its library's threads are awake
        and those of the one before asleep; weights that fit a cache are then read from there.
      **facts: put into every row.

    Returns:
      Rows as in `bench`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name, function in candidates.items():
            if at_once:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, values in seconds.items():
        low, middle, high = 1e3 * np.percentile(values, [25, 50, 75])
        rows.append({"name": name, "ms": middle, "spread_ms": [low, high], **facts})
    for row in rows:
        row["speedup"] = rows[0]["ms"] / row["ms"]
    return rows


def random_planes(key: jax.Array, shape: tuple[int, ...], bits: int) -> BitPlanes:
    """Planes of random bits with steps about those of Gaussian weights of variance 1 / d_in."""
    seed = int(jax.random.bits(key, (), jnp.uint32))
    return _fill(seed, jax.eval_shape(partial(bitplane.empty, shape, bits)))


def _fill(seed: int, like: BitPlanes) -> BitPlanes:
    """Planes of these shapes, drawn."""
    steps, rows = tables_lib.num_steps(like.bits), like.tables[0].shape[-3]
    firsts = np.cumsum((0, *tables_lib.segments(like.bits)))[:-1]
    size = 1.3 * like.d_in**-0.5 * 2.0**-firsts
    codes, _ = tables_lib.round_step(jnp.asarray(size, jnp.float32))
    offsets = jnp.full(rows - steps, 128)  # about 0
    middle = jnp.concatenate([codes, offsets], dtype=jnp.uint8)[:, None, None]
    table = middle + _integers(seed, like.tables[0].shape, 9) - jnp.uint8(4)
    return replace(like, planes=_integers(seed + 1, like.planes.shape, 1 << 32), tables=(table,))


def products(
    repeats: int, shape: tuple[int, int] = SHAPE, tokens: Sequence[int] = (1, 16, 256)
) -> list[dict[str, Any]]:
    """`mcjax.dot` at several widths and numbers of rows beside `jnp.dot` and torch."""
    rows = []
    key = jax.random.key(0)
    weight = jax.random.normal(key, shape, jnp.float32)
    half = weight.astype(jnp.bfloat16)
    planes = {k: random_planes(jax.random.fold_in(key, k), shape, k) for k in (1, 2, 3, 4)}
    multiply = jax.jit(jnp.dot)
    ours = {act: jax.jit(partial(dot, act_bits=act)) for act in (None, 8, 16)}
    for count in tokens:
        x = jax.random.normal(jax.random.fold_in(key, 9), (count, shape[0]))
        candidates: dict[str, Callable] = {"jnp.dot float32": partial(multiply, x, weight)}
        candidates["jnp.dot bfloat16"] = partial(multiply, x.astype(jnp.bfloat16), half)
        candidates |= _torch_product(x, half)
        facts: dict[str, tuple[float, float | None]] = {"jnp.dot float32": (4, None)}
        for k, p in planes.items():
            exact = np.asarray(x, np.float64) @ np.asarray(p.dequantize(), np.float64)
            for act in (8, 16, None) if count < 256 else (8, None):
                name = f"mcjax {k} bits" + (f", int{act} activations" if act else "")
                candidates[name] = partial(ours[act], x, p)
                error = np.linalg.norm(np.asarray(candidates[name]()) - exact)
                facts[name] = (p.nbytes / weight.size, float(error / np.linalg.norm(exact)))
        for row in timed(candidates, repeats, tokens=count):
            per_weight, deviation = facts.get(row["name"], (2, None))
            rows.append({**row, "bytes": per_weight * weight.size, "error": deviation})
    return rows


def _torch_product(x, weight) -> dict[str, Callable]:
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    rows = torch.from_numpy(np.array(x)).bfloat16()
    matrix = torch.from_numpy(np.array(weight.astype(jnp.float32))).bfloat16()

    def product():
        return float((rows @ matrix)[0, 0])

    return {"torch bfloat16": product}


def experts(repeats: int) -> list[dict[str, Any]]:
    """Two of eight experts of one token, beside a gathered einsum and `ragged_dot` in float32."""
    e, d_in, d_out = 8, 2048, 7168
    key = jax.random.key(1)
    weight = jax.random.normal(key, (e, d_in, d_out), jnp.float32)
    x, index = jax.random.normal(key, (1, d_in)), jnp.array([[5, 2]])
    gathered = jax.jit(lambda x, w, i: jnp.einsum("ti,tkio->tko", x, w[i]))

    def ragged(x, w, i):
        order = jnp.argsort(i[0])
        sizes = jnp.bincount(i[0], length=e)
        return jax.lax.ragged_dot(jnp.repeat(x, 2, 0), w, sizes.astype(jnp.int32))[order]

    candidates = {
        "einsum of gathered experts": partial(gathered, x, weight, index),
        "ragged_dot": partial(jax.jit(ragged), x, weight, index),
        "mcjax dense": partial(jax.jit(expert_dot), x, weight, index),
    }
    for k in (1, 2, 3):
        planes = random_planes(jax.random.fold_in(key, k), (e, d_in, d_out), k)
        ours = jax.jit(partial(expert_dot, act_bits=8))
        candidates[f"mcjax {k} bits, int8 activations"] = partial(ours, x, planes, index)
    stacks = [
        jax.tree.map(lambda a: a[:4], random_planes(key, (e, d_in, d_out), k)) for k in (1, 3)
    ]
    mixed = bitplane.mixed(stacks, (1, 3) * 4)
    candidates["mcjax 1 and 3 bits, int8 activations"] = partial(ours, x, mixed, index)
    return timed(candidates, repeats)


def served_moe(
    act_bits: int | None = 8, config: Mapping[str, Any] | None = None
) -> tuple[LanguageModel, Any]:
    """The model of a config, or `MOE`, from planes of random bits.

    Half of its experts are a bit above and half a bit below `BUDGET`. What is not in planes is
    bfloat16, as in an artifact.
    """
    module = LanguageModel(describe(config or MOE)[1], act_bits=act_bits)
    params = random_params(module.decoder, jnp.bfloat16, (BUDGET + 1, BUDGET - 1))
    return module, layout.put(params)


def dense_moe() -> tuple[LanguageModel, Any]:
    """`MOE` with dense random weights, each routed expert a product of its own."""
    module = LanguageModel(describe(MOE)[1])
    return module, random_params(module.decoder, jnp.float32)


def _models() -> dict[str, tuple[LanguageModel, Any]]:
    return {
        "dense float32": dense_moe(),
        f"mcjax {BUDGET} bits, int8 activations": served_moe(),
        f"mcjax {BUDGET} bits, int16 activations": served_moe(act_bits=16),
        f"mcjax {BUDGET} bits": served_moe(act_bits=None),
    }


def random_params(decoder: Decoder, dtype: Any, widths: Sequence[int] = (), other: int = 4) -> Any:
    """Parameters of a model: random arrays of `dtype` or, with widths, random planes.

    NumPy draws what a CPU holds, which takes no compiling; other devices draw their own, of which
    `jax.eval_shape` makes shapes alone.

    Args:
      decoder: the model.
      dtype: of arrays.
      widths: of experts, which take them in turns; none for a dense model.
      other: of the other products' weights.
    """

    def array(seed, role, layers=()):
        shape = (*layers, *role.shape)
        if role.path[-1].endswith("norm"):
            return jnp.ones(shape, dtype)
        outer = role.path[-1] in ("embedding", "head")
        return _normal(seed, shape, dtype, shape[-1 if outer else -2] ** -0.5)

    def seed_of(path):
        return zlib.crc32(".".join(path).encode())

    def planes_of(seed, shape, bits):  # rotated, as those of artifacts are
        like = jax.eval_shape(partial(bitplane.empty, shape, bits, rotated=True))
        return _fill(seed, like)

    params: dict[str, Any] = {}
    for role in weights.rest(decoder):
        weights.put(params, role.path, array(seed_of(role.path), role))
    for member in weights.members(decoder):
        count, paths = len(member.numbers), set()
        if widths:
            paths = {role.path for role in weights.budgeted(decoder, member.layer)}
        for role in weights.roles(member.layer, decoder.width):
            path = member.path + role.path
            seed, shape = seed_of(path), role.shape[-2:]
            if role.path in paths:
                each = np.resize(widths, (count, *role.shape[:-2]))
                stacks = [
                    planes_of(seed + 16 * int(k), (int((each == k).sum()), *shape), int(k))
                    for k in np.unique(each)
                ]
                made: Any = bitplane.mixed(stacks, each)
            elif widths and role.tap is not None:
                made = planes_of(seed, (count, *role.shape), other)
            else:
                made = array(seed, role, (count,))
            weights.put(params, path, made)
    return params


def _integers(seed: int, shape: tuple[int, ...], most: int) -> jax.Array:
    """Integers below `most`, uint8 or uint32."""
    kind = jnp.uint8 if most <= 256 else jnp.uint32
    if device.platform() == "cpu":
        return jnp.asarray(np.random.default_rng(seed).integers(0, most, shape, kind))
    key = jax.random.key(seed)
    if most == 1 << 32:
        return jax.random.bits(key, shape, kind)
    return jax.random.randint(key, shape, 0, most, kind)


def _normal(seed: int, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    """Gaussian numbers of this deviation."""
    if device.platform() == "cpu":
        drawn = np.random.default_rng(seed).standard_normal(shape, np.float32) * scale
        return jnp.asarray(drawn.astype(dtype))
    parts = shape[0] if len(shape) > 2 else 1  # one after another, which bounds what it takes

    def draw(key):
        some = jax.random.normal(key, (math.prod(shape) // parts,), dtype)
        return some * jnp.asarray(scale, dtype)

    @jax.jit
    def every(keys):
        return jax.lax.map(draw, keys).reshape(shape)

    return every(jax.random.split(jax.random.key(seed), parts))


def decoding(
    repeats: int, steps: int = 8, others: Mapping[str, tuple[Callable[[], Any], int]] | None = None
) -> list[dict[str, Any]]:
    """Milliseconds a token of `MOE` at batch 1.

    Args:
      repeats: as in `timed`.
      steps: tokens that are written each time.
      others: peers by name: what writes `steps` tokens with them, and the bytes of their weights.

    Returns:
      Rows as in `bench`, with `tokens_per_second` and `bytes_held`.
    """
    every = {
        name: (
            partial(write_tokens, module, params, steps),
            sum(a.nbytes for a in jax.tree.leaves(params)),
        )
        for name, (module, params) in _models().items()
    } | dict(others or {})
    rows = timed({name: run for name, (run, _) in every.items()}, repeats)
    for row in rows:
        row["ms"] /= steps
        row["spread_ms"] = [value / steps for value in row["spread_ms"]]
        row["tokens_per_second"] = 1e3 / row["ms"]
        row["bytes_held"] = every[row["name"]][1]
    return rows


def write_tokens(module: LanguageModel, params: Any, steps: int) -> jax.Array:
    """The likeliest token int32 [1] after `steps` of them, in a cache of 512 tokens."""
    cache = module.empty_cache(1, _PROMPT)
    token, greedy = np.zeros(1, np.int32), Sampling()
    for i in range(steps):
        position = np.full(1, i, np.int32)  # NumPy's: no small programs beside the one that counts
        token, cache = decode(module, params, token, position, cache, None, greedy)
    return jnp.asarray(token)


def prefilling(repeats: int) -> list[dict[str, Any]]:
    """Reading a prompt of 512 tokens."""
    prompt = jax.random.randint(jax.random.key(1), (1, _PROMPT), 0, MOE["vocab_size"])
    greedy, length = Sampling(), jnp.full(1, _PROMPT)

    def run(module, params):
        cache = module.empty_cache(1, _PROMPT)
        return prefill(module, params, prompt, length, cache, None, greedy)[0]

    return timed({name: partial(run, *model) for name, model in _models().items()}, repeats)


def loading(repeats: int) -> list[dict[str, Any]]:
    """Reading the embedded model: dense from safetensors, and from its artifact at each width."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        compress(EMBEDDED, artifact, EMBEDDED / "calibration.txt", samples=4, seq_len=128)
        candidates: dict[str, Callable] = {"safetensors": lambda: serving.load(EMBEDDED).params}
        for k in (1, 2, 4):
            candidates[f"artifact, {k} bits"] = lambda k=k: serving.load(artifact, bits=k).params
        return timed(candidates, repeats)


_EXTRA = {
    "products": ("tokens", "of roofline", "error"),
    "decode": ("tokens/s", "MB held"),
}


def columns(part: str) -> list[str]:
    """The headings that go with `cells`."""
    return ["", "ms (quartiles)", "speed-up", *_EXTRA.get(part, ())]


def cells(facts: Mapping[str, Any], part: str, row: Mapping[str, Any]) -> list[str]:
    """A row of one part of `bench`'s facts as text.

    A product's roofline is the time to read its weight once at the bandwidth of copying.
    """
    low, high = row["spread_ms"]
    texts = [row["name"], f"{row['ms']:.2f} ({low:.2f} to {high:.2f})", f"{row['speedup']:.2f}x"]
    if part == "products":
        bound = row["bytes"] / facts["machine"]["bandwidth_gb_s"] / 1e6
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        texts += [str(row["tokens"]), f"{bound / row['ms']:.0%}", error]
    elif part == "decode":
        texts += [f"{row['tokens_per_second']:.0f}", f"{row['bytes_held'] / 1e6:.0f}"]
    return texts


def titles() -> dict[str, str]:
    """What each part of `bench` measures."""
    d_in, d_out = SHAPE
    decoder = describe(MOE)[1]
    every = [weights.rest(decoder), *(weights.roles(i, decoder.width) for i in decoder.layers)]
    parameters = sum(math.prod(role.shape) for roles in every for role in roles)
    return {
        "products": f"{d_in} x {d_out} products",
        "experts": "2 of 8 experts of 2048 x 7168, one token",
        "decode": f"decoding, batch 1, a model of {parameters / 1e6:.0f} million parameters",
        "prefill": f"prefill of {_PROMPT} tokens, the same model",
        "load": "loading the embedded model",
    }


def caption(machine: Mapping[str, Any]) -> str:
    """Device, bandwidth and versions in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['platform']}: {machine['device']}, {machine['processor']}; copies at "
        f"{machine['bandwidth_gb_s']:.1f} GB/s; {versions}"
    )


def tables(facts: Mapping[str, Any]) -> list[Any]:
    """The facts of `bench` as rich tables."""
    from rich.table import Table

    every = []
    for part, title in titles().items():
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(columns(part)):
            table.add_column(name, justify="right" if i else "left")
        rows = facts[part]
        for row, following in zip(rows, [*rows[1:], {}], strict=True):
            table.add_row(
                *cells(facts, part, row), end_section=row.get("tokens") != following.get("tokens")
            )
        every.append(table)
    every[-1].caption = caption(facts["machine"])
    return every
