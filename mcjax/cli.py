"""The command line. Progress and errors go to stderr, results to stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcjax import options
from mcjax.notes import Note, note


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = options.parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Orbax logs, and its threads print, what it then raises to us as well.
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda _: None
    try:
        with _notes_on_stderr():
            if "compilation_cache" in arguments:
                _keep_programs(arguments.compilation_cache)
            COMMANDS[arguments.command](arguments)
    except (ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"mcjax: error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mcjax: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Prints the library's notes as lines on stderr, other warnings as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        # A full disk, for instance; the program is compiled all the same.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
        others = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if issubclass(category, Note):
                print(f"mcjax: note: {message}", file=sys.stderr)
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _keep_programs(choice: str | None) -> None:
    """Has JAX keep what it compiles, for later commands to load.

    Args:
      choice: a folder, "off", or None for JAX_COMPILATION_CACHE_DIR if that is set, else the user's
        cache folder. A folder that cannot be written is done without.
    """
    import jax

    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if choice is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # JAX knows
    try:
        folder = _user_cache() / "compiled" if choice is None else Path(choice).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        if choice is not None:
            note(f"compiled programs are not kept: cannot write to {choice}: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _user_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mcjax"


def program() -> None:
    """The installed command: `main`, with stdout kept for results alone.

    HiGHS greets on the C library's stdout, which is closed to it.
    """
    results = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(results, "w")
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a failed write would print on the way out


def _pruning(arguments: argparse.Namespace) -> dict[str, Any]:
    from mcjax.odp import QUANTILE

    policy, quantile = arguments.odp_policy, arguments.odp_quantile
    if not arguments.odp and not (policy is quantile is None):
        raise ValueError("--odp-policy and --odp-quantile need --odp")
    return {
        "act_bits": arguments.act_bits,
        "prune": (policy or "affine") if arguments.odp else None,
        "quantile": QUANTILE if quantile is None else quantile,
    }


def _budget(arguments: argparse.Namespace) -> float | str | None:
    """The budget as a number of bits, or as it was written if it is one of bytes."""
    from mcjax.programme import Bytes, parse

    if arguments.budget is None:
        return None
    found = parse(arguments.budget)
    return arguments.budget if isinstance(found, Bytes) else found


def _console(tables: Iterable[Any]) -> Any:
    """Prints tables; returns the console for more."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    return console


def _demo(arguments: argparse.Namespace) -> None:
    from mcjax.demo import demo, tables

    facts = demo(arguments.out, progress=_progress)
    if arguments.json:
        print(json.dumps(facts))
        return
    console = _console(tables(facts))
    console.print(
        f"16-bit model {_size(facts['model_bytes'])}; one artifact for every budget "
        f"{_size(facts['artifact_bytes'])}; plots and artifact in {arguments.out}/\n"
    )
    console.print("At 2.5 bits, skipping experts, it writes:\n", style="dim")
    console.print(facts["sample"], markup=False)


def _bench(arguments: argparse.Namespace) -> None:
    from mcjax.bench import bench, tables

    facts = bench(arguments.repeats, progress=_progress)
    if arguments.json:
        print(json.dumps(facts))
        return
    _console(tables(facts))


def _compress(arguments: argparse.Namespace) -> None:
    from mcjax.compress import compress, coverage
    from mcjax.job import prepare

    group_size = None
    if arguments.group_size != "auto":
        try:
            group_size = int(arguments.group_size)
        except ValueError:
            raise ValueError(
                f"--group-size must be a number or auto, got {arguments.group_size!r}"
            ) from None
    options = {
        "max_bits": arguments.max_bits,
        "group_size": group_size,
        "samples": arguments.samples,
        "seq_len": arguments.seq_len,
        "effort": arguments.effort,
        "bos": arguments.bos,
    }
    memory = _memory(arguments)
    if arguments.dry_run:
        _foretell(prepare(arguments.model, arguments.calibration, **options), memory)
        return
    manifest = compress(
        arguments.model,
        arguments.out,
        arguments.calibration,
        memory=memory,
        resume=arguments.resume,
        progress=_progress,
        **options,
    )
    made_of = manifest["calibration"]
    print(
        f"calibrated on {made_of['windows']} windows of {made_of['window_tokens']} tokens",
        file=sys.stderr,
    )
    for layer, expert, tokens in coverage(manifest):
        print(
            f"rare: expert {expert} of layer {layer} got {tokens} of "
            f"{manifest['statistics']['tokens']} calibration tokens; its layer's inputs stood in",
            file=sys.stderr,
        )
    print(
        f"{arguments.out}: widths {manifest['statistics']['bits']}, "
        f"{_size(_directory_bytes(Path(arguments.out)))}"
    )


def _memory(arguments: argparse.Namespace) -> int | None:
    """The bytes of --memory."""
    from mcjax.programme import Bytes, parse

    if arguments.memory is None:
        return None
    try:
        size = parse(arguments.memory)
    except ValueError:
        size = 0.0
    if not isinstance(size, Bytes):
        raise ValueError(f"--memory must be a size such as 6GB, got {arguments.memory!r}")
    return size.limit


def _foretell(job: Any, memory: int | None) -> None:
    """Prints what a job would take."""
    from rich.table import Table

    from mcjax.forecast import forecast, within
    from mcjax.process_memory import sparing

    progress = sparing(_progress)
    if memory is not None:
        job = within(job, memory)
    found = forecast(job, progress=progress)
    table = Table("stage", "memory", "minutes", title="what it would take here, about")
    for stage in found.stages:
        size = _size(found.process + stage.bytes)
        table.add_row(stage.name, size, f"{stage.seconds / 60:.1f}")
    table.add_section()
    table.add_row("at most, and in all", _size(found.memory), f"{found.seconds / 60:.1f}")
    console = _console([table])
    console.print(
        f"memory: {_size(found.process)} of it for the process itself, and more if freed memory "
        f"is kept, as it is without --memory\ndisk: {_size(found.disk)} while it runs, "
        f"{_size(found.artifact)} for the artifact"
    )


def _info(arguments: argparse.Namespace) -> None:
    from mcjax.checkpoint import ArtifactReader, verify
    from mcjax.report import CACHED, describe, plot

    facts = describe(arguments.out, _budget(arguments), arguments.policy)
    if arguments.verify:
        checked = verify(ArtifactReader(arguments.out))
        print(f"all {_size(checked)} match their checksums", file=sys.stderr)
    if arguments.plot:
        plot(facts, arguments.plot)
    if arguments.json:
        print(json.dumps(facts))
        return
    for key in (
        "path",
        "source_sha256",
        "layers",
        "experts",
        "max_bits",
        "attention_widths",
        "group_sizes",
        "bytes",
        "feasible_budgets",
        "feasible_bytes",
        "calibration",
    ):
        print(f"{key:18} {facts[key]}")
    print(f"{'cache_bytes':18} {facts['cache_bytes']} more for a sequence of {CACHED} tokens")
    for layer, expert, tokens in facts["rare_experts"]:
        print(f"rare               expert {expert} of layer {layer}: {tokens} calibration tokens")
    if facts["allocation"] is not None:
        unit = "" if isinstance(facts["budget"], str) else " bits"
        print(f"allocation at {facts['budget']}{unit} (rows are layers)")
        for row in facts["allocation"]:
            each = (width if isinstance(width, int) else "/".join(map(str, width)) for width in row)
            print("  " + " ".join(map(str, each)))
        if isinstance(facts["budget"], str):
            print("widths of all else")
            for layer, part, width in facts["widths"]:
                print(f"  layer {layer} {part} {width}")
        print(f"predicted loss     {facts['predicted_loss']:.4f} nats a token")


def _evaluate(arguments: argparse.Namespace) -> None:
    from mcjax.evaluate import evaluate
    from mcjax.report import record

    facts = evaluate(
        arguments.model,
        arguments.text,
        budget=_budget(arguments),
        policy=arguments.policy,
        bits=arguments.bits,
        attention_bits=arguments.attention_bits,
        seq_len=arguments.seq_len,
        max_tokens=arguments.max_tokens,
        calibration=arguments.calibration,
        bos=arguments.bos,
        **_pruning(arguments),
        progress=_progress,
    )
    plain = not arguments.odp and arguments.act_bits is arguments.attention_bits is None
    plain = plain and arguments.bos == "auto" and arguments.policy == "loss"
    if plain and Path(arguments.model, "manifest.json").is_file():
        record(arguments.model, Path(arguments.text).name, facts)
    if arguments.json:
        print(json.dumps(facts))
        return
    print(f"perplexity        {facts['perplexity']:.4f} on {facts['tokens']} tokens")
    print(
        f"expert bits       {facts['average_bits']:.3f} average, "
        f"{facts['effective_bits']:.3f} with tables"
    )
    if arguments.odp:
        print(f"experts skipped   {100 * facts['experts_pruned']:.1f} % of those routed to")
    print(f"bytes read        {facts['bytes_read']} ({_size(facts['bytes_read'])})")
    print(f"cache beside them {_size(facts['cache_bytes'])} for {arguments.seq_len} tokens")
    print(f"tokens a second   {facts['tokens_per_second']:.0f}")


def _generate(arguments: argparse.Namespace) -> None:
    from mcjax.generate import Sampling, generate_text

    if arguments.draft_bits is None and arguments.draft_length is not None:
        raise ValueError("--draft-length needs --draft-bits")
    stream = len(arguments.prompt) == 1 and not arguments.json
    before = ["" if arguments.chat else prompt for prompt in arguments.prompt]
    pending = before[:1]  # written once the first token is there, so never on an error

    def write(text: str) -> None:
        print(*pending, text, sep="", end="", flush=True)
        pending.clear()

    facts = generate_text(
        arguments.model,
        arguments.prompt,
        budget=_budget(arguments),
        policy=arguments.policy,
        bits=arguments.bits,
        attention_bits=arguments.attention_bits,
        **_pruning(arguments),
        cache_dtype=arguments.cache_type,
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
        ),
        seed=arguments.seed,
        stop=arguments.stop,
        write=write if stream else None,
        draft_bits=arguments.draft_bits,
        bos=arguments.bos,
        chat=arguments.chat,
        draft_length=4 if arguments.draft_length is None else arguments.draft_length,
    )
    if arguments.json:
        print(json.dumps(facts))
    elif stream:
        print()
    else:
        for prompt, text in zip(before, facts["texts"], strict=True):
            print(prompt + text)
    if facts["acceptance"] is not None:
        print(f"{100 * facts['acceptance']:.0f} % of drafted tokens accepted", file=sys.stderr)
    print(f"{facts['tokens_per_second']:.1f} tokens a second", file=sys.stderr)


def _progress(items: Any, description: str = "") -> Any:
    """A rich progress bar on stderr around a sized iterable."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        items,
        description=description,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


COMMANDS = {
    "demo": _demo,
    "bench": _bench,
    "compress": _compress,
    "info": _info,
    "eval": _evaluate,
    "generate": _generate,
}

if __name__ == "__main__":
    program()
