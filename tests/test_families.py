"""Every family against Hugging Face's logits, in one piece and token by token, and its tensors."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import mcjax
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.decoder import segments
from mcjax.models.families import PAGES, describe
from mcjax.models.language_model import LanguageModel
from mcjax.notes import Note

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem.removeprefix("family_") for path in FIXTURES.glob("family_*.npz"))
SOURCE = Path(mcjax.__file__).parent


def fixture(name):
    """Config, tokens, logits and tensors."""
    arrays = dict(np.load(FIXTURES / (name if "." in name else f"family_{name}.npz")))
    config = json.loads(str(arrays.pop("config")))
    return config, arrays.pop("tokens"), arrays.pop("logits"), arrays


def write(folder, config, tensors):
    """A Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=NAMES, scope="module")
def case(request, tmp_path_factory):
    config, tokens, logits, tensors = fixture(request.param)
    folder = write(tmp_path_factory.mktemp("family") / "model", config, tensors)
    return mcjax.load(folder), tokens, logits


def error(got, wanted):
    """Relative to the largest logit."""
    return float(np.max(np.abs(np.asarray(got) - wanted)) / np.max(np.abs(wanted)))


def test_every_family_has_fixtures():
    known = {fixture(name)[0]["model_type"] for name in NAMES} | {"mixtral", "kimi_k2"}
    assert known == set(PAGES)
    assert tuple(mcjax.families()) == tuple(PAGES)


def test_the_readme_has_the_families():
    readme = (SOURCE.parent / "README.md").read_text()
    for page in dict.fromkeys(PAGES.values()):
        kinds = ", ".join(f"`{kind}`" for kind in page.MODEL_TYPES)
        assert f"| {page.NAME} | {kinds} | {page.CHECKED} |" in readme
        for kind in page.MODEL_TYPES:
            assert mcjax.families()[kind] == f"{page.NAME}: {page.CHECKED}"


def test_logits_are_the_references(case):
    model, tokens, logits = case
    assert error(model(tokens), logits) < 1e-4


def test_caches_give_the_same(case):
    """Ragged prompts padded at the end, in chunks, then token by token."""
    model, tokens, logits = case
    module, params, length = model.module, model.params, tokens.shape[1]
    apply = jax.jit(module.apply)
    cache = module.empty_cache(2, length + 7)
    at = np.zeros(2, int)
    for real in (np.array([4, 7]), np.array([3, 1])):
        padded = np.pad(tokens, ((0, 0), (0, 7)))
        rows = np.stack([padded[b, n : n + 7] for b, n in enumerate(at)])
        out, cache = apply({"params": params}, rows, at[:, None] + np.arange(7), cache, real)
        for b, n in enumerate(at):
            assert error(out[b, : real[b]], logits[b, n : n + real[b]]) < 2e-4
        at = at + real
    for _ in range(length - 8):
        row = np.stack([tokens[b, n : n + 1] for b, n in enumerate(at)])
        out, cache = apply({"params": params}, row, at[:, None], cache)
        for b, n in enumerate(at):
            assert error(out[b, 0], logits[b, n]) < 2e-4
        at = at + 1


def test_batches_equal_single_prompts(case):
    model, tokens, _ = case
    together = model(tokens)
    for b in range(2):
        assert error(model(tokens[b : b + 1])[0], together[b]) < 1e-5


def test_init_has_the_shapes_of_what_is_read(case):
    model, tokens, _ = case
    drawn = jax.eval_shape(lambda: model.module.init(jax.random.key(0), tokens))["params"]
    assert jax.tree.map(lambda a: a.shape, drawn) == jax.tree.map(lambda a: a.shape, model.params)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "gpt_oss", "qwen3_moe", "qwen3_next"])
def test_gradients_are_finite_and_reach_every_weight(name, tmp_path):
    config, tokens, _, tensors = fixture(name)
    model = mcjax.load(write(tmp_path / "model", config, tensors))

    def loss(params):
        logits = model.module.apply({"params": params}, tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    params = jax.tree.map(lambda a: a.astype(jnp.float32), model.params)
    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    still = [jax.tree_util.keystr(p) for p, g in gradients if not np.any(np.asarray(g))]
    assert all(np.isfinite(g).all() for _, g in gradients)
    # The correction chooses experts and weighs none.
    assert all("correction" in path for path in still), still


def test_every_weight_matters(case):
    """Each tensor of the checkpoint moved alone moves the logits."""
    model, tokens, logits = case
    leaves, tree = jax.tree.flatten(model.params)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(model.params)]
    for i, leaf in enumerate(leaves):
        noise = np.random.default_rng(i).standard_normal(leaf.shape).astype(leaf.dtype)
        moved = [*leaves[:i], leaf + 0.3 * noise, *leaves[i + 1 :]]
        other = replace(model, params=jax.tree.unflatten(tree, moved))
        assert error(other(tokens), logits) > 2e-3, names[i]


@pytest.mark.parametrize("name", NAMES)
def test_rules_write_what_they_read(name, tmp_path):
    config, _, _, tensors = fixture(name)
    folder = Folder(write(tmp_path / "model", config, tensors))
    for i, layer in enumerate(folder.decoder.layers):
        for rule in folder._rules(i, layer):
            if any("{e}" in n for n in rule.names):
                count = layer.block.experts
                own = [
                    np.stack([tensors[folder._inner(i)(n.format(e=e))] for e in range(count)])
                    for n in rule.names
                ]
            else:
                own = [tensors[folder._inner(i)(n)] for n in rule.names]
            back = rule.write([np.asarray(a) for a in rule.read(own)])
            for a, b in zip(own, back, strict=True):
                np.testing.assert_allclose(a, b.astype(np.float16), rtol=1e-3, atol=1e-6)


def test_kimi_is_a_deepseek(tmp_path):
    config, tokens, logits, tensors = fixture("deepseek_v3")
    config = config | {"model_type": "kimi_k2"}
    assert error(mcjax.load(write(tmp_path / "model", config, tensors))(tokens), logits) < 1e-4


def test_a_wrapper_is_looked_into(tmp_path):
    config, tokens, logits, tensors = fixture("gemma3")
    wrapped = {f"language_model.{name}": value for name, value in tensors.items()}
    wrapped["vision_tower.patch.weight"] = np.ones((2, 2), np.float16)
    outer = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 4}}
    model = mcjax.load(write(tmp_path / "model", outer, wrapped))
    assert error(model(tokens), logits) < 1e-4


def test_a_wrapper_as_transformers_saves_it(tmp_path):
    config, tokens, logits, tensors = fixture("wrapped_gemma3.npz")
    model = mcjax.load(write(tmp_path / "model", config, tensors))
    assert error(model(tokens), logits) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_multiplier": 2.0}, "attention_multiplier=2.0"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a positive integer, got 0"),
        ({"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
        ({"model_type": "qwen9"}, "'qwen9' is not supported"),
        ({"model_type": ["mixtral"]}, "is not supported"),
        ({"hidden_size": 38}, "config.json implies"),
        ({"num_experts": 7}, "missing, first model.layers.0.mlp.experts.6"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "unknown rope type 'spiral'"),
    ],
)
def test_configs_are_refused(tmp_path, change, message):
    config, _, _, tensors = fixture("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        mcjax.load(write(tmp_path / "model", config | change, tensors))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "nothing reads .*q_proj.bias"),
        ("base_model.model.layers.0.lora_A.weight", "nothing reads .*lora_A"),
        ("model.layers.0.mlp.gate.qweight", "mlp.gate is a GPTQ weight without qzeros, scales"),
        ("model.layers.0.mlp.gate.weight.absmax", "is of a bitsandbytes checkpoint"),
        ("model.layers.7.mlp.gate.weight", "nothing reads"),
    ],
)
def test_tensors_are_refused(tmp_path, name, message):
    config, _, _, tensors = fixture("qwen3_moe")
    surplus = {**tensors, name: np.ones(2, np.float16)}
    with pytest.raises(ValueError, match=message):
        mcjax.load(write(tmp_path / "model", config, surplus))


def test_harmless_tensors_are_left(tmp_path):
    config, tokens, logits, tensors = fixture("qwen3_moe")
    surplus = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float16)}
    surplus["mtp.fc.weight"] = np.ones(2, np.float16)
    model = mcjax.load(write(tmp_path / "model", config, surplus))
    assert error(model(tokens), logits) < 1e-4


def test_segments_find_periods():
    def lengths(text):
        return [("".join(s.period), s.repeats) for s in segments(list(text))]

    assert lengths("aaaa") == [("a", 4)]
    assert lengths("abbbb") == [("a", 1), ("b", 4)]
    assert lengths("aaabaaabaaab") == [("aaab", 3)]
    assert lengths("aaaaabaaaaabaaaaabaa") == [("aaaaab", 3), ("a", 2)]
    assert lengths("abc") == [("a", 1), ("b", 1), ("c", 1)]
    for text in ("abababa", "aabbaabb", "abcabcabd"):
        assert "".join("".join(s.period) * s.repeats for s in segments(list(text))) == text


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v32", "llama4", "lfm2_moe", "llama", "gemma4", "qwen3_next"]
)
def test_programs_do_not_grow_with_depth(name):
    """A deep model's program has no more instructions than one of a few periods."""
    config = fixture(name)[0]
    whole, sizes = config["num_hidden_layers"], []
    for times in (4, 16):
        more = {key: config[key] * times for key in config.keys() & PER_LAYER}
        deep = config | more | {"num_hidden_layers": whole * times}
        deep = {key: value for key, value in deep.items() if key not in ("moe_layers", *DROPPED)}
        module = LanguageModel(describe(deep)[1])
        params = jax.eval_shape(lambda m=module: weights.init(m.decoder, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        text = jax.jit(module.apply).lower({"params": params}, tokens).as_text()
        sizes.append(text.count("\n"))
    assert sizes[1] <= 1.02 * sizes[0]


PER_LAYER = {"layer_types", "mlp_layer_types", "no_rope_layers"}
DROPPED = ("per_layer_config", "mlp_only_layers")


def test_families_are_known_on_their_pages_alone():
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "families":
            text = path.read_text()
            for branch in ("model_type ==", "model_type in", 'model_type") =='):
                assert branch not in text, path


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        ([[0, 64]], ValueError, "tokens must be 0 to 63, got 0 to 64"),
        ([[-1, 3]], ValueError, "got -1 to 3"),
        ([1, 2, 3], ValueError, r"\[B, T\], got 1 dimensions: \(3,\)"),
        ([[1.0, 2.0]], TypeError, "tokens must be integers, got float64"),
    ],
)
def test_tokens_are_checked(tmp_path, tokens, kind, message):
    config, wanted, logits, tensors = fixture("qwen3_moe_plain")
    model = mcjax.load(write(tmp_path / "model", config, tensors))
    with pytest.raises(kind, match=message):
        model(tokens)
    assert error(model(wanted.tolist()), logits) < 1e-4
    assert error(jax.jit(lambda m, t: m(t))(model, wanted), logits) < 1e-4


def test_a_folder_is_served_dense_only(tmp_path):
    config, _, _, tensors = fixture("gpt_oss")
    folder = write(tmp_path / "model", config, tensors)
    with pytest.raises(ValueError, match="not an artifact"):
        mcjax.load(folder, budget=2.0)
    model = mcjax.load(folder)
    assert model.average_bits == model.effective_bits == 16
    with pytest.raises(ValueError, match="dense weights, not planes"):
        model.refine(budget=2.0)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("mixtral_*.npz")), ids=lambda p: p.stem)
def test_mixtral_is_the_references(path, tmp_path):
    arrays = dict(np.load(path))
    config, tokens, logits = (arrays.pop(name) for name in ("config", "tokens", "logits"))
    if arrays.pop("bfloat16"):
        arrays = {name: value.view(ml_dtypes.bfloat16) for name, value in arrays.items()}
    model = mcjax.load(write(tmp_path / "model", json.loads(str(config)), arrays))
    assert error(model(tokens), logits) < 1e-4


def test_a_quantization_config_beside_floats_is_named(tmp_path):
    config, tokens, logits, tensors = fixture("qwen3_moe_plain")
    folder = write(tmp_path / "model", config | {"quantization_config": {"bits": 4}}, tensors)
    with pytest.warns(Note, match="quantization_config is not read"):
        model = mcjax.load(folder)
    assert error(model(tokens), logits) < 1e-4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"layer_types": ["full_attention"]}, "1 layer_types for 7 layers"),
        ("gemma3", {"layer_types": ["conv"] * 7}, "layer type 'conv' is not supported"),
        ("llama4", {"layer_types": ["sliding_attention"] * 4}, "'sliding_attention' is not"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "beta": 2}}, "{'beta': 2} is not known"),
        ("mistral4", {"rope_parameters": "x"}, "a field has an impossible value"),
        ("llama", {"rope_parameters": "yarn"}, "must be an object, got 'yarn'"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta of the rotation must be a"),
        ("granitemoe", {"logits_scaling": 0}, "a field has an impossible value"),
        ("deepseek_v3", {"topk_group": 5}, "5 of 4 groups of 2 experts cannot be kept"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 heads of values cannot share 2 of keys"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is missing"),
        ("llama4", {"no_rope_layers": [1, 0]}, "2 no_rope_layers for 4 layers"),
        ("lfm2_moe", {"layer_types": ["conv"] * 4}, "4 layer_types for 5 layers"),
        ("glm4_moe", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types .* of 3 layers"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full"]}, "indexer_types .* not supp"),
        ("gemma4", {"hidden_size_per_layer_input": 8}, "embeddings for each layer"),
        ("gemma4", {"num_kv_shared_layers": 2}, "num_kv_shared_layers 2 is not supported"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 3]}, "moe_topk differs between layers"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias True is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("llama", {"model_type": "llama9"}, "'llama9' is not supported; mixtral, qwen3_moe, qwen2"),
    ],
)
def test_what_a_page_does_not_serve_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        describe(fixture(name)[0] | change)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_5_moe", {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}),
        ("glm4_moe_lite", {"partial_rotary_factor": 1.0}),
        ("glm_moe_dsa", {"indexer_rope_interleave": True}),
        ("ernie4_5_moe", {"moe_gate": "topk", "moe_capacity": [64], "use_rmsnorm": True}),
        ("minimax_m2", {"use_mtp": True, "qk_norm_type": "per_layer", "rotary_dim": 6}),
        ("deepseek_v3", {"seq_aux": True, "ep_size": 1, "scoring_func": "sigmoid"}),
    ],
)
def test_fields_of_published_configs_change_nothing(name, fields):
    config = fixture(name)[0]
    assert describe(config | fields)[1] == describe(config)[1]


def test_an_alpha_is_a_base(tmp_path):
    config = fixture("hunyuan_v1_moe")[0]
    given = {"type": "dynamic", "alpha": 8.0, "factor": 1.0, "rope_theta": 100.0}
    rope = describe(config | {"rope_parameters": given})[1].layers[0].mixer.rope
    assert rope.config.rope_theta == pytest.approx(100 * 8 ** (10 / 8))
    assert rope.config.rope_type == "default"


def test_a_field_that_would_change_the_layers_is_refused(tmp_path):
    config, _, _, tensors = fixture("deepseek_v3")
    with pytest.raises(ValueError, match="moe_layer_freq 2 is not supported"):
        mcjax.load(write(tmp_path / "model", config | {"moe_layer_freq": 2}, tensors))


def test_paths_of_parameters_are_known_in_one_place():
    """No module but those of the decoder spells one out."""
    import re

    spelled = re.compile(r'"(block|mixer)[".]|segment_\d|\["(mixer|block)"\]')
    modules = [p for p in SOURCE.rglob("*.py") if "models" not in p.parts]
    found = [
        (path.name, line)
        for path in modules
        for line in path.read_text().splitlines()
        if spelled.search(line) and "block_input" not in line
    ]
    assert len(modules) > 30 and not found
