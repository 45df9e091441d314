"""Define the command ``compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orpo_lite.cli.app import RESULTS, AsJson, RecipeName, app
from orpo_lite.cli.completion import complete_key
from orpo_lite.cli.console import err, out, print_columns, print_json
from orpo_lite.cli.finish import STOPPED
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import quiet
from orpo_lite.errors import Command, RecipeError

if TYPE_CHECKING:
    from orpo_lite.comparing.table import Comparison
    from orpo_lite.evaluation.intervals import Interval


@app.command(rich_help_panel=RESULTS, epilog="Example: orpo-lite compare --recipe demo")
def compare(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE | ARM:KEY=VALUE]...",
            help="Set a key of the recipe for all arms, or for one arm, the judge or PPO's reward "
            "model, for example dpo:loss.beta=0.2 or judge:training.num_train_epochs=3.",
            autocompletion=complete_key,
        ),
    ] = None,
    recipe: RecipeName = None,
    arms: Annotated[
        str,
        typer.Option(
            metavar="ARM,...",
            help="The objectives to compare: sft (one epoch), sft-equal-epochs, orpo, dpo, simpo, "
            "ppo, cpo. dpo, simpo and ppo start from the adapter of sft.",
        ),
    ] = "sft,orpo,dpo,simpo",
    seeds: Annotated[int, typer.Option(metavar="N", help="Number of trainings of each arm.")] = 1,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Number of sampled answers to each prompt.")
    ] = 3,
    prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of held-out prompts to answer. Default: 64, or fewer for few data.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Largest number of tokens in an answer, also in PPO.",
        ),
    ] = 128,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="The folder. Default: the recipe's run, with -compare."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which objective gives the best answers on your data, by a judge, with 95% intervals.

    To continue a stopped command, run it again.
    """
    if recipe is None:
        raise RecipeError(
            where="orpo-lite compare",
            found="no recipe is given",
            expected="--recipe NAME",
            fix=Command("orpo-lite compare --recipe demo"),
        )
    with quiet():
        from orpo_lite.comparing.compare import compare_events

        updates = compare_events(
            recipe,
            settings or [],
            arms=arms,
            seeds=seeds,
            rounds=rounds,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            out=to,
        )
        try:
            result = draw(updates, silent=as_json)
        except KeyboardInterrupt:
            err.print("stopped; run the same command again to continue")
            raise typer.Exit(STOPPED) from None
    if as_json:
        print_json(result.to_json())
    else:
        _print_result(result)


def _print_result(result: "Comparison") -> None:
    """Print the win rates, the figures of each arm, and the verdict."""
    from orpo_lite.comparing.page import PAGE, mean_win_rate, passes

    head = (f"{result.prompts:,} prompts x {result.rounds}", "win rate", "SD over rounds")
    rows: list[tuple[str, ...]] = [(*head, "at equal lengths", "outcome")]
    for win in result.wins:
        deviation = "-" if win.round_sd is None else f"{100 * win.round_sd:.1f}"
        name = f"{win.model} against {win.against}"
        shares = _share(win.rate), deviation, _share(win.length_controlled)
        rows.append((name, *shares, win.outcome))
    print_columns(rows)
    out.print()
    columns = (
        "mean win rate",
        "mean reward",
        "tokens",
        "PID",
        "AID",
        "passes",
        "steps",
        "kept",
        "seconds",
    )
    rows = [("arm", *columns, "GiB")]
    for row in result.arms:
        rate, cost = mean_win_rate(row.name, result.wins), row.cost
        numbers = (row.reward.value, row.diversity.pid, row.diversity.aid)
        reward, pid, aid = ("-" if value is None else f"{value:.3f}" for value in numbers)
        after = f" (+ {cost.before_seconds:.1f} {cost.starts_from})" if cost.starts_from else ""
        rows.append(
            (
                row.name,
                "-" if rate is None else f"{rate:.1%}",
                reward,
                f"{row.tokens:.1f}",
                pid,
                aid,
                passes(row),
                f"{cost.steps:,.0f}",
                f"{cost.kept_step:,.0f}",
                f"{cost.seconds:,.1f}{after}",
                f"{cost.memory_gib:.2f}",
            )
        )
    print_columns(rows)
    out.print(f"PID and AID: {result.embedding}")
    out.print()
    for sentence in result.verdict:
        out.print(sentence)
    if result.remark:
        out.print(result.remark)
    out.print(f"wrote {result.folder / PAGE}; open it in a browser")


def _share(found: "Interval") -> str:
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
