"""Define the commands for use after a training: merge, push and export."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orpo_lite.cli.app import AFTER, RunFolder, app
from orpo_lite.cli.completion import complete_target
from orpo_lite.cli.console import err, out
from orpo_lite.cli.finish import STOPPED, merge_run, push_run, verify_export, verify_run
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import hush, quiet
from orpo_lite.errors import RecipeError


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite merge runs/demo --verify")
def merge(
    run: RunFolder,
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(
            help="The weights to merge into. original: the base's 16-bit weights. dequantized: "
            "the 4-bit weights that the training used, converted back to 16 bit."
        ),
    ] = "original",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Also compare the merged model with its base and adapter on held-out pairs.",
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of one weight file.")
    ] = "5GB",
    base_path: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of the base, if the base was moved."),
    ] = None,
) -> None:
    """Merge a run's adapter into its base. RUN/merged is then a model that transformers loads."""
    with quiet():
        merge_run(run, weights=base, max_shard_size=max_shard_size, base_path=base_path)
        if verify:
            verify_run(run, base, base_path)


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite push runs/demo me/demo")
def push(
    run: RunFolder,
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPO",
            help="The repository, as owner/name. Without an owner, it is in your account.",
        ),
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="Push RUN/merged, not the adapter.")
    ] = False,
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(help="With --merged: push the model that `merge` made with this --base."),
    ] = "original",
    public: Annotated[
        bool,
        typer.Option("--public", help="If the repository is new, make it public, not private."),
    ] = False,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            max=20,
            help="Show this many held-out prompts with their answers in the model card.",
        ),
    ] = 0,
) -> None:
    """Push a run's adapter, or its merged model, to the hub, with a model card."""
    hush()
    if base == "dequantized" and not merged:
        raise RecipeError(
            where="--base dequantized",
            found="is given without --merged",
            expected="--merged as well, because --base chooses between two merged models",
            fix="add --merged",
        )
    options: dict[str, Any] = {
        "merged": base if merged else None,
        "is_public": public,
        "samples": samples,
    }
    try:
        push_run(run, repository, **options)
    except KeyboardInterrupt:
        from orpo_lite.publishing.push import push_command

        err.print(f"stopped; continue with: {push_command(run, repository, **options)}")
        raise typer.Exit(STOPPED) from None


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite export runs/demo --to vllm")
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="The target: gguf (llama.cpp), ollama or vllm.",
            autocompletion=complete_target,
        ),
    ],
    outtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights in a GGUF file: f32, f16, bf16, q8_0, q3_k_m, q4_k_m, "
            "q5_k_m or q6_k. Default: the type of the merged model."
        ),
    ] = None,
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(help="Export the model that `merge` wrote with the same --base."),
    ] = "original",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Also score pairs with llama.cpp, and print how much (in %) of the adapter's gain "
            "in log odds is left in the exported file.",
        ),
    ] = False,
) -> None:
    """Export a run for llama.cpp, Ollama or vLLM to RUN/export, and print how to use it."""
    with quiet():
        from orpo_lite.exporting.targets import export_events

        if verify and to == "vllm":
            raise RecipeError(
                where="--verify",
                found="is given together with --to vllm",
                expected="--to gguf or --to ollama, because vLLM serves the weights unchanged",
                fix="remove --verify",
            )
        updates = export_events(run, to, outtype=outtype, weights=base, needs_llama_cpp=verify)
        result = draw(updates)
    for note in result.notes:
        out.print(f"note: {note}")
    out.print(
        f"wrote {result.folder} ({result.bytes / 2**20:,.1f} MiB); use it with:\n{result.command}"
    )
    if verify:
        with quiet():
            verify_export(run, result.folder, base)
