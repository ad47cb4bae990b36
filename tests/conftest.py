"""A small random Mixtral folder, its artifact, and strict promotion for every test."""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import compiler

from mcjax.compress import compress
from mcjax.hub import write
from mcjax.models import weights
from mcjax.models.families import describe

# Workers, notebooks and commands compile much the same programs; each is compiled once a run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="mcjax-tests-")  # gone when pytest ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))  # the scripts' own imports

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
}


LONG = "notebooks artifacts cli tree families sharding train composition_model tune allocate demo"
"""Files that take longest, and first, or one worker would be alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONG.split()]
    place = {name: place for place, name in enumerate(names)}
    items.sort(key=lambda item: place.get(item.path.name, len(names)))


QUICKLY_COMPILED = {
    "test_allocate.py",
    "test_artifacts.py",
    "test_bitplane.py",
    "test_cli.py",
    "test_composition_model.py",
    "test_demo.py",
    "test_documents.py",
    "test_dp4a.py",
    "test_families.py",
    "test_forecast.py",
    "test_formats.py",
    "test_generate.py",
    "test_hub.py",
    "test_lora.py",
    "test_importance.py",
    "test_names.py",
    "test_notebooks.py",
    "test_odp.py",
    "test_once_lm.py",
    "test_pallas.py",
    "test_qat.py",
    "test_quantize.py",
    "test_sensitivity.py",
    "test_serving.py",
    "test_speculate.py",
    "test_text.py",
    "test_train.py",
    "test_tree.py",
    "test_tune.py",
    "test_tune_lm.py",
    "test_vision.py",
    "test_vision_models.py",
    "test_vocabulary.py",
    "test_work.py",
}
"""Files about how parts fit together, most of whose time is compiling: there, and in the processes
that they start, LLVM optimises little, XLA on CPU emits fusions in its older way, which takes half
the time, and each module in one piece, which takes a sixth less. Products, what JAX transforms them
into, and meshes are compiled as users have them."""

QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@pytest.fixture(scope="session")
def compile_options():
    """Options for compiling quickly; none where this version of XLA does not know them."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=QUICK)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return QUICK


@pytest.fixture(scope="module", autouse=True)
def programs(request, compile_options):
    """Frees a file's compiled programs: Linux lets a process map 65530 regions, each maps some."""
    quickly = request.path.name in QUICKLY_COMPILED
    jax.config.update("jax_disable_most_optimizations", quickly)
    usual = compiler.get_compile_options  # JAX has no setting for options of every program

    def get_compile_options(*args, env_options_overrides=None, **more):
        options = {**compile_options, **(env_options_overrides or {})}
        return usual(*args, env_options_overrides=options, **more)

    with pytest.MonkeyPatch.context() as patch:  # the environment is for processes started here
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quickly)))
        if quickly and compile_options:
            flags = os.environ.get("XLA_FLAGS", "")
            more = (f"--{name}={str(value).lower()}" for name, value in compile_options.items())
            patch.setenv("XLA_FLAGS", " ".join([flags, *more]))
            patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text of some thousand words."""
    words = [f"{a}{b}" for a in ("ba", "ko", "li", "su") for b in ("n", "rt", "me", "")]
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words, 6000)))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, text_file):
    """A random Mixtral in Hugging Face form with a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("model")
    params = weights.init(describe(CONFIG)[1], jax.random.key(0))
    block = params["segment_0"]["layer_0"]["block"]
    # Two of the logits a, -a, b, -b are always positive, so expert 3 of layer 1 is never routed to.
    first, (a, b) = block["router"][0], block["router"][1][:, :2].T
    block["router"] = np.stack([first, np.stack([a, -a, b, 0 * a, -b], axis=1)])
    write(folder, CONFIG, params)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text_file)], vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, worker_id, model_folder, text_file):
    """The folder compressed to three planes, by the worker that wants it first."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "artifact"
    out = folder / "small.mcjax"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(3000):
            if out.exists():  # it appears whole
                return out
            time.sleep(0.1)
        raise
    compress(model_folder, out, text_file, max_bits=3, group_size=32, samples=16, seq_len=64)
    return out
