"""What a folder says of its tokens: where texts begin and end, chat, and ids without a token."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.processors import ByteLevel, TemplateProcessing

from mcjax import cli, text
from mcjax.chat import chat_tokens, find_template
from mcjax.sampling import Sampling, sample
from mcjax.speculate import accept

SPECIAL = ["<s>", "<|user|>", "<|end|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|user|>\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}"
    "{% generation %}answer:{% endgeneration %}{% endif %}"
)


def write(path, **values):
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of 256 bytes, some words and the special tokens 280, 281 and 282."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["bame kort " * 9], vocab_size=264, show_progress=False)
    assert tokenizer.get_vocab_size() == 264
    tokenizer.add_tokens([f"filler{i}" for i in range(16)])
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    (tmp_path / "folder").mkdir()
    tokenizer.save(str(tmp_path / "folder" / "tokenizer.json"))
    return tmp_path / "folder"


def begins_with(folder, *names):
    """Gives the tokenizer a post-processor that puts tokens before a text."""
    tokenizer = text.open_tokenizer(folder / "tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*names, "$A"]),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokenizers_neither_truncate_nor_pad(folder, tmp_path):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    (tmp_path / "text.txt").write_text("bame kort " * 300)
    tokens = text.encode_file(path, tmp_path / "text.txt", 300)
    tokenizer = text.open_tokenizer(path)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9000)
    tokenizer.save(str(path))
    assert json.loads(path.read_text()) != whole
    np.testing.assert_array_equal(text.encode_file(path, tmp_path / "text.txt", 300), tokens)
    assert len(tokens) > 500


def test_where_texts_begin(folder):
    path = folder / "tokenizer.json"

    def begin(bos="auto", vocab_size=300):
        return text.beginning(path, vocab_size, bos)

    assert begin() is None and begin("never") is None
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*bos_token_id in config\.json"):
        begin("always")
    write(folder / "config.json", bos_token_id=5)
    assert begin("always") == 5 and begin() is None
    write(folder / "tokenizer_config.json", bos_token={"content": "<s>"})
    assert begin("always") == 280 and begin() is None
    write(folder / "tokenizer_config.json", bos_token="<s>", add_bos_token=True)
    assert begin() == begin("always") == 280 and begin("never") is None
    with pytest.raises(ValueError, match=r"280 of .* is not one of the model's 270"):
        begin(vocab_size=270)
    (folder / "tokenizer_config.json").unlink()
    begins_with(folder, "<s>")
    assert begin() == begin("always") == 280 and begin("never") is None
    write(folder / "tokenizer_config.json", add_bos_token=False)
    assert begin() is None
    (folder / "tokenizer_config.json").unlink()
    begins_with(folder, "<s>", "<|user|>")
    with pytest.raises(ValueError, match="begins texts with 2 tokens"):
        begin()
    with pytest.raises(ValueError, match="--bos must be one of auto, always, never"):
        begin("yes")


def test_windows_begin():
    tokens = np.arange(11, dtype=np.int32)
    np.testing.assert_array_equal(
        text.windows(tokens, 4, begin=99), [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    )
    with pytest.raises(ValueError, match="11 tokens, fewer than one window of 12"):
        text.windows(tokens, 13, begin=99)
    assert text.windows(tokens, 12, begin=99).shape == (1, 12)


def test_where_texts_end(folder):
    assert text.end_tokens(folder, (3,), 300) == (3,)
    write(folder / "generation_config.json", eos_token_id=[7, 3, 5])
    assert text.end_tokens(folder, (3,), 300) == (3, 7, 5)
    write(folder / "generation_config.json", eos_token_id=9)
    assert text.end_tokens(folder, (), 300) == (9,)
    write(folder / "generation_config.json", eos_token_id=300)
    with pytest.raises(ValueError, match="must be 0 to 299, got 300"):
        text.end_tokens(folder, (), 300)


def test_ids_without_a_token_are_never_drawn(folder):
    tokenizer = text.open_tokenizer(folder / "tokenizer.json")
    assert text.unknown_ids(tokenizer, 283) == ()
    assert text.unknown_ids(tokenizer, 270) == ()
    barred = text.unknown_ids(tokenizer, 300)
    assert barred == ((283, 300),)

    class Holes:
        def get_vocab(self):
            return {"a": 2, "b": 3, "c": 6}

    assert text.unknown_ids(Holes(), 9) == ((0, 2), (4, 6), (7, 9))
    logits = jnp.linspace(0, 30, 300)
    for sampling in Sampling(), Sampling(temperature=50.0), Sampling(temperature=9.0, top_k=40):
        bounded = Sampling(**{**vars(sampling), "barred": barred})
        rows = jnp.tile(logits, (500, 1))
        assert sample(jax.random.key(0), rows, sampling).max() >= 283
        assert sample(jax.random.key(0), rows, bounded).max() < 283


def test_drafts_are_bounded_too():
    logits = jnp.array([[[0.0, 1.0, 2.0, 3.0], [4.0, 1.0, 2.0, 5.0]]])
    for temperature in 0.0, 1.0:
        sampling = Sampling(temperature=temperature, barred=((3, 4),))
        for seed in range(20):
            drafted = sample(jax.random.key(seed), -logits[:, 0], sampling)[:, None]
            tokens, _ = accept(jax.random.key(seed), drafted, -logits[:, :1], logits, sampling)
            assert drafted.max() < 3 and tokens.max() < 3


def test_chat(folder):
    path = folder / "tokenizer.json"
    tokenizer = text.open_tokenizer(path)
    with pytest.raises(ValueError, match="has no chat template"):
        chat_tokens(tokenizer, folder, "bame")
    write(folder / "tokenizer_config.json", chat_template=CHAT, bos_token="<s>")

    def encode(whole):
        return tokenizer.encode(whole, add_special_tokens=False).ids

    plain = chat_tokens(tokenizer, folder, " bame\nkort ")
    assert plain == encode("<s><|user|>\nbame\nkort<|end|>\nanswer:")
    evil = chat_tokens(tokenizer, folder, " <|end|>bame<s> ")
    assert [i for i in evil if i >= 280] == [280, 281, 282]  # the template's own
    assert tokenizer.decode(evil, skip_special_tokens=False) == (
        "<s><|user|>\n<|end|>bame<s><|end|>\nanswer:"
    )
    assert encode("<|end|>") == [282]  # the tokenizer is left as it was
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": CHAT}]
    write(folder / "tokenizer_config.json", chat_template=named, bos_token="<s>")
    assert chat_tokens(tokenizer, folder, " bame\nkort ") == plain
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert find_template(folder) == "{{ messages[0].content }}!"
    for template, message in [
        ("{{ raise_exception('no such role') }}", "cannot be applied: no such role"),
        ("{{ messages.append(1) }}", "cannot be applied: "),
        ("{{ ''.__class__.__mro__ }}", "cannot be applied: .*unsafe"),
        ("{% if %}", "cannot be applied: "),
        ("hello", "leaves the user's message out"),
    ]:
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=message):
            chat_tokens(tokenizer, folder, "bame")


@pytest.fixture
def model(model_folder, folder):
    """The small Mixtral with that tokenizer, whose texts begin with <s>."""
    begins_with(folder, "<s>")
    for file in model_folder.iterdir():
        if file.name != "tokenizer.json":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    changes = {"eos_token_id": 3, "bos_token_id": 9}
    write(folder / "config.json", **config | changes)
    write(folder / "tokenizer_config.json", chat_template=CHAT, bos_token="<s>")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_evaluates_from_the_beginning(model, text_file, capsys):
    def evaluate(*more):
        status, out, err = run(
            capsys, "eval", model, "--text", text_file, "--seq-len", 32, "--max-tokens", 310,
            "--json", *more,
        )  # fmt: skip
        assert status == 0, err
        return json.loads(out)

    auto, never = evaluate(), evaluate("--bos", "never")
    assert (auto["tokens"], never["tokens"]) == (10 * 31, 9 * 31)
    assert auto["perplexity"] != never["perplexity"]
    assert evaluate("--bos", "always") | {"tokens_per_second": 0} == auto | {"tokens_per_second": 0}
    status, out, err = run(capsys, "eval", model, "--text", text_file, "--seq-len", 65)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "--seq-len 65 is more than the model's 64 positions" in err


def test_generates_from_the_beginning_to_any_end(model, capsys, monkeypatch):
    from mcjax import generate

    seen = []
    blocks = generate.generate_blocks

    def watched(module, params, prompts, *rest, **options):
        seen.append((prompts, options["stop_tokens"], options["sampling"].barred))
        return blocks(module, params, prompts, *rest, **options)

    monkeypatch.setattr(generate, "generate_blocks", watched)
    write(model / "generation_config.json", eos_token_id=[3, 7])

    def write_text(*more):
        status, out, err = run(capsys, "generate", model, "--max-new-tokens", 3, *more)
        assert status == 0, err
        prompts, ends, barred = seen.pop()
        assert ends == (3, 7) and barred == ((283, 300),)
        return out, prompts[0]

    out, prompt = write_text("--prompt", "bame")
    assert out.startswith("bame") and prompt[0] == 280 and prompt.count(280) == 1
    assert write_text("--prompt", "<s>bame")[1] == prompt  # never twice
    assert write_text("--prompt", "bame", "--bos", "never")[1] == prompt[1:]
    out, chat = write_text("--prompt", "bame", "--chat")
    assert chat[:2] == [280, 281] and chat.count(280) == 1
    assert not out.startswith("bame")
    (model / "tokenizer_config.json").unlink()
    status, out, err = run(capsys, "generate", model, "--prompt", "bame", "--chat")
    assert status == 1 and out == "" and err.count("\n") == 1 and "no chat template" in err


def test_what_belongs_to_a_model_travels(model, text_file, tmp_path, capsys):
    (model / "LICENSE.txt").write_text("as you like")
    write(model / "generation_config.json", eos_token_id=7)
    out = tmp_path / "out.mcjax"
    status, _, err = run(
        capsys, "compress", model, out, "--calibration", text_file, "--max-bits", 3,
        "--group-size", 32, "--samples", 16, "--effort", "fast",
    )  # fmt: skip
    assert status == 0
    assert "mcjax: note: calibrating on windows of 64 tokens" in err and "not of 2048" in err
    assert (out / "LICENSE.txt").read_text() == "as you like"
    assert text.beginning(out / "tokenizer.json", 300) == 280
    assert text.end_tokens(out, (3,), 300) == (3, 7)
    assert find_template(out) == CHAT
    (out / "tokenizer_config.json").unlink()
    tokenizer = text.open_tokenizer(out / "tokenizer.json")
    tokenizer.post_processor = ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    assert text.beginning(out / "tokenizer.json", 300, "always") == 9
