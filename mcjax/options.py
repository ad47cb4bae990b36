"""What can be asked of the command line, with the help that tells so."""

from __future__ import annotations

import argparse
from importlib import metadata

EXAMPLES = """examples:
  mcjax demo
  mcjax compress Qwen/Qwen3-30B-A3B qwen3.mcjax --calibration c4.jsonl.gz
  mcjax eval qwen3.mcjax --text wiki.txt --budget 2.05
  mcjax generate qwen3.mcjax --prompt "Once upon a time" --budget 2.5 --odp
  mcjax info qwen3.mcjax --budget 2.05 --plot allocation.png
  mcjax bench
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `command` of what it parses is the command's name."""
    parser = argparse.ArgumentParser(
        prog="mcjax",
        description="Quantise a Mixture-of-Experts model once; serve it at any precision.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mcjax {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for add in (_demo, _bench, _compress, _info, _evaluate, _generate):
        add(commands)
    return parser


def _demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="the whole story on an embedded model, in minutes, without a network",
        description="Compresses the embedded model once, serves it at five budgets beside models "
        "that GPTQ made for each, skips experts, writes a sample; leaves artifact, figures and "
        "plots in --out.",
    )
    command.add_argument(
        "--out", default="mcjax-demo", metavar="DIR", help="folder to write (default mcjax-demo)"
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object")
    _add_cache(command)


def _bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench",
        help="how fast products, decoding, prefill and loading are on this machine",
        description="Times mcjax beside dense JAX, and torch where it is installed, taking turns; "
        "takes a few minutes, so leave the machine alone meanwhile. Figures are medians; speeds "
        "are ratios to the first row of each table.",
    )
    command.add_argument(
        "--repeats", type=int, default=11, metavar="N", help="of each measurement (default 11)"
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object")
    _add_cache(command)


def _compress(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compress",
        help="Hugging Face model -> one artifact for every width",
        description="Quantises a language model to bit planes. One artifact then serves every "
        "average bit-width up to --max-bits, chosen when it is loaded.",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="folder with config.json, *.safetensors, tokenizer.json; or a name on the hub, "
        "OWNER/NAME or OWNER/NAME@REVISION",
    )
    command.add_argument("out", metavar="OUT", help="the artifact to write; must not exist")
    command.add_argument(
        "--calibration",
        metavar="TEXT",
        required=True,
        help="text like what the model will see, a megabyte is plenty: a UTF-8 file, or .jsonl "
        "with a text in each line, either also as .gz; or a data set on the hub, OWNER/NAME, "
        "OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT",
    )
    command.add_argument(
        "--max-bits", type=int, default=4, help="planes of each expert weight, 1 to 8 (default 4)"
    )
    command.add_argument(
        "--group-size",
        default="auto",
        help="input features that share a scale, a multiple of 32; auto (default) is "
        "the largest up to 128 that fits each weight",
    )
    command.add_argument(
        "--samples", type=int, default=128, help="calibration windows (default 128)"
    )
    command.add_argument(
        "--seq-len", type=int, default=2048, help="tokens in a window (default 2048)"
    )
    command.add_argument(
        "--effort",
        default="normal",
        metavar="fast|normal|thorough|best",
        help="time for quality: 1, 6 or 15 rounds of descent (default normal); best trains "
        "tables of all widths, norms and routers end to end after the normal ones, which gains "
        "most at few bits, and holds all planes in memory",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from where an interrupted run was, and keep what is done if interrupted",
    )
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="keep to about this much memory, 6GB for instance: less is worked on at once, which "
        "takes longer; refused if the least is more",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: say what memory, disk and time it would take here, from what XLA "
        "makes of each kind of layer and how long one takes",
    )
    _add_bos(command)
    _add_cache(command)


def _info(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info",
        help="what an artifact holds, and the allocation at a budget",
        description="Describes an artifact: sizes, widths, experts that calibration hardly "
        "reached, and how a budget is shared out.",
    )
    command.add_argument("out", metavar="OUT", help="an artifact")
    _add_budget(command)
    _add_policy(command)
    command.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw the allocation (layers x experts), and "
        "perplexity against bytes where `mcjax eval` has measured it",
    )
    command.add_argument(
        "--verify", action="store_true", help="read every byte and check it against its checksum"
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object")


def _evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval",
        help="perplexity of a model or an artifact at any budget",
        description="Perplexity on a text: tokenised whole, cut into windows of --seq-len.",
    )
    command.add_argument(
        "model", metavar="MODEL|OUT", help="an artifact, or a Hugging Face folder or name"
    )
    command.add_argument(
        "--text", metavar="TEXT", required=True, help="a text, as --calibration of `compress` has"
    )
    width = command.add_mutually_exclusive_group()
    _add_budget(width)
    width.add_argument("--bits", type=int, help="one width for every expert")
    _add_policy(command)
    _add_attention_bits(command)
    _add_pruning(command)
    command.add_argument(
        "--calibration",
        metavar="TEXT",
        help="with --odp on a MODEL folder: text to choose its thresholds by",
    )
    command.add_argument(
        "--seq-len", type=int, default=512, help="tokens in a window (default 512)"
    )
    command.add_argument("--max-tokens", type=int, help="use only the first tokens of the text")
    command.add_argument("--json", action="store_true", help="end with one JSON object")
    _add_bos(command)
    _add_cache(command)


def _generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="write text from a prompt, at any budget",
        description="Continues a prompt, writing as it goes; several --prompt run as one batch.",
    )
    command.add_argument(
        "model", metavar="OUT|MODEL", help="an artifact, or a Hugging Face folder or name"
    )
    command.add_argument(
        "--prompt", metavar="TEXT", required=True, action="append", help="repeat for a batch"
    )
    width = command.add_mutually_exclusive_group()
    _add_budget(width)
    width.add_argument("--bits", type=int, help="one width for every expert")
    _add_policy(command)
    _add_attention_bits(command)
    _add_pruning(command)
    command.add_argument(
        "--draft-bits",
        type=int,
        metavar="K",
        help="draft tokens with K planes of each expert, on CPU with int8 activations; the model "
        "as it is verifies them, so the text stays the same (artifacts only)",
    )
    command.add_argument(
        "--draft-length", type=int, metavar="N", help="tokens to draft at a time (default 4)"
    )
    command.add_argument(
        "--cache-type",
        choices=("float32", "bfloat16"),
        help="of keys and values of past tokens (default float32)",
    )
    command.add_argument("--max-new-tokens", type=int, default=128, help="(default 128)")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    command.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    command.add_argument(
        "--top-p", type=float, help="sample among the likeliest tokens that hold this probability"
    )
    command.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    command.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeat"
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object")
    _add_bos(command)
    command.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, answered in the model's chat template",
    )
    _add_cache(command)


def _add_budget(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--budget",
        metavar="BITS|BYTES",
        help="average bits per expert weight, such as 2.5; or bytes for all that is read, such as "
        "4.2GB (4.2e9) or 4GiB, which attention and all else then share",
    )


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--policy",
        choices=["loss", "paper"],
        default="loss",
        help="share a budget out by what each expert, matrix and layer costs at the end of the "
        "model (default), or by MC-MoE's published rule for experts",
    )


def _add_attention_bits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--attention-bits",
        type=int,
        metavar="K",
        help="width of all that the budget is not about: attention, shared experts, dense layers "
        "beside routed ones (default 4; `mcjax info` lists the stored widths)",
    )


def _add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--compilation-cache",
        metavar="DIR|off",
        help="where compiled programs are kept for later commands (default "
        "$JAX_COMPILATION_CACHE_DIR, else mcjax/compiled in the user's cache folder)",
    )


def _add_bos(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bos",
        choices=["auto", "always", "never"],
        default="auto",
        help="begin each window or prompt with the beginning-of-sequence token; auto (default) is "
        "as the tokenizer says",
    )


def _add_pruning(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--act-bits",
        type=int,
        choices=[8, 16],
        help="round activations to so many bits, which makes a CPU several times as fast "
        "(artifacts only)",
    )
    command.add_argument(
        "--odp", action="store_true", help="skip experts of small routing weight, token by token"
    )
    command.add_argument(
        "--odp-policy",
        choices=["affine", "paper"],
        help="what stands in for a skipped expert: an estimate of its output (default), or "
        "nothing, as published",
    )
    command.add_argument(
        "--odp-quantile",
        type=float,
        help="share of the experts after each token's first to skip (default 0.3)",
    )


def _version() -> str:
    try:
        return metadata.version("mcjax")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "of a checkout"
