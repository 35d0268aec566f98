"""Commands for a compressed model: train it, make it dense, let it generate, take it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import tnlm
from tnlm.cli.loading import load
from tnlm.cli.options import FILE, Bos, Dtype, Json, MaxLength, Model, Overwrite, Seed
from tnlm.cli.output import print_json
from tnlm.errors import ModelError, OptionError

after = typer.Typer()

PASSED_ON: Any = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": ["--help"],
}
"""For commands whose last arguments, ``-h`` among them, are another program's."""

Out = Annotated[Path, typer.Argument(help="Output directory, new or empty.")]


def _load(model: str, out: Path, dtype: str, overwrite: bool) -> tuple[Any, Any]:
    """Return a model and its tokenizer, if the output can be written."""
    from tnlm.checkpoint.exchange import check_writable

    check_writable(out, overwrite=overwrite)
    return load(model, dtype=dtype)


@after.command()
def heal(
    model: Model,
    out: Out,
    text: Annotated[Path, typer.Argument(help="Training data: a text or JSONL file.", **FILE)],
    tokens: Annotated[int, typer.Option(help="Tokens to train on.", min=1)] = 262_144,
    rank: Annotated[int, typer.Option(help="Rank of the LoRAs.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-4,
    max_length: MaxLength = 512,
    bos: Bos = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train LoRAs on a compressed model, merge them into its factors, and save it."""
    loaded, tokenizer = _load(model, out, dtype, overwrite)
    tnlm.heal(
        loaded,
        text,
        tokenizer=tokenizer,
        tokens=tokens,
        rank=rank,
        learning_rate=learning_rate,
        max_length=max_length,
        bos="auto" if bos is None else bos,
        seed=seed,
        progress=not as_json,
    )
    tnlm.save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    _print_files(out, as_json)


@after.command("to-dense")
def to_dense(
    model: Model,
    out: Out,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Multiply the factors out, and save an ordinary dense model."""
    from tnlm.checkpoint.exchange import replace_directory

    loaded, tokenizer = _load(model, out, dtype, overwrite)
    dense = tnlm.to_dense(loaded)

    def write(directory: Path) -> None:
        dense.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    replace_directory(out, write, overwrite=overwrite)
    _print_files(out, as_json)


@after.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1)] = 64,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text greedily."""
    loaded, tokenizer = load(model, dtype=dtype)
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer, which reads the prompt")
    if not loaded.can_generate():
        raise ModelError(f"{model} is a {type(loaded).__name__}, which does not generate text")
    given = tokenizer(prompt, return_tensors="pt")
    if given["input_ids"].shape[1] == 0:
        raise OptionError(f"prompt={prompt!r} has no token; give a text to continue")
    made = loaded.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    # Decoded with the prompt, as tokenizers strip the first space of a text.
    read, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True))
        for ids in (given["input_ids"][0], made[0])
    )
    if as_json:
        print_json({"prompt": prompt, "text": whole.removeprefix(read)})
    else:
        typer.echo(whole)


@after.command()
def export(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option(help="gguf for llama.cpp, transformers, decilm or vllm.")],
    type_: Annotated[
        str | None, typer.Option("--type", help="Of the weights, such as F16, Q8_0 or Q4_0.")
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model for a runtime that does not know tnlm."""
    from tnlm.runtimes.export import writer_of

    writer_of(to, type_)  # before a large model is loaded
    loaded, tokenizer = _load(model, out, dtype, overwrite)
    tnlm.export(loaded, out, to=to, type=type_, tokenizer=tokenizer, overwrite=overwrite)
    _print_files(out, as_json)


@after.command(context_settings=PASSED_ON)
def run(
    command: Annotated[list[str], typer.Argument(help="A program with its arguments.")],
) -> None:
    """Run a Python program, such as lm_eval, that can then load compressed models."""
    from tnlm.runtimes.run import run as start

    start(command)


@after.command(context_settings=PASSED_ON)
def serve(
    directory: Annotated[Path, typer.Argument(help="A model with its tokenizer.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Of `transformers serve`, such as --port 8000.")
    ] = None,
) -> None:
    """Answer chats over HTTP, by `transformers serve` with tnlm registered."""
    from tnlm.runtimes.serve import serve as start

    start(directory, options or [])


def _print_files(directory: Path, as_json: bool) -> None:
    """Print the files of a directory, with their sizes."""
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if as_json:
        print_json(files)
        return
    for name, size in files.items():
        typer.echo(f"{directory / name}: {size / 1e6:,.1f} MB")
