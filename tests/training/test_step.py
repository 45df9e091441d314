"""The gradient of an optimizer step is the same however its pairs are cut into micro-batches, rows and processes."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import in_float64, ragged_pairs, tiny_llama, tiny_opt, write_base
from peft import LoraConfig, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from benchmarks.lengths import idle_share, shipped
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.data.packing import (
    Batching,
    epoch_order,
    micro_batches,
    nll_tokens,
    pad_pairs,
)
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import OrpoLiteError
from orpo_lite.model import held_out
from orpo_lite.model.load import load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.probe import probe
from orpo_lite.model.score_head import add_score_head
from orpo_lite.model.sharding import local_bytes
from orpo_lite.objectives.objective import Divisors, find_objective
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.training.session import refuse_other_pairs, refuse_other_recipes
from orpo_lite.training.step import accumulate, seed_dropout

PADDED = Batching(
    packed=False, share=False, tokens=0, pairs=2, pad_id=0, completion_only_loss=False
)
PACKED = replace(PADDED, packed=True, share=True, tokens=60)
REDUCTIONS = [("token", "false"), ("pair", "true")]  # the authors' code; the paper's text


def recipe(**values: Any) -> Recipe:
    return load_recipe(
        "mistral-qlora", [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    )


def lora_model(
    base: torch.nn.Module,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    task: str = "CAUSAL_LM",
) -> PairModel:
    """LoRA on every linear layer, with B drawn too, for at B = 0 the gradient of A vanishes."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type=task, lora_dropout=dropout
    )
    if task == "SEQ_CLS":
        add_score_head(base, seed=0)
    model = get_peft_model(base, config).to(dtype)  # type: ignore[arg-type]
    model = in_float64(model) if dtype == torch.float64 else model
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return PairModel(model).train()


def gradients(
    model: PairModel,
    pairs: list[TokenizedPair],
    settings: Recipe,
    processes: Processes | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[torch.Tensor, list[float]]:
    """All LoRA gradients of one step as one vector, and the step's figures."""
    model.zero_grad(set_to_none=True)
    parts = accumulate(
        model,
        find_objective(settings.loss),
        pairs,
        model.batching(settings, 0),
        step=0,
        seed=settings.training.seed,
        processes=processes or Processes(cpu=True),
        scaler=scaler or torch.amp.GradScaler("cpu", enabled=False),
    )
    return torch.cat([parameter.grad.flatten() for _, parameter in model.trained()]), parts  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
@pytest.mark.parametrize(("reduction", "only"), REDUCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_micro_batches_give_one_gradient(
    make: Callable[[], Any], reduction: str, only: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, pairs = lora_model(make(), dtype), ragged_pairs(8)
    found = {}
    for size in (1, 2, 4, 8):
        settings = recipe(
            memory__micro_batch_size=size,
            loss__nll_reduction=reduction,
            loss__completion_only_loss=only,
            loss__beta=0.5,
        )
        found[size] = gradients(model, pairs, settings)
    whole, figures = found[8]
    assert whole.norm() > 0.1
    for size in (1, 2, 4):
        assert (found[size][0] - whole).norm() / whole.norm() < tolerance
        assert found[size][1] == pytest.approx(figures, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("reduction", "only"), REDUCTIONS)
def test_padded_rows_equal_separate_sequences(reduction: str, only: str) -> None:
    """float64: the step against each sequence alone, unpadded, with log-softmax and the divisors by hand."""
    model, pairs = lora_model(tiny_llama()), ragged_pairs(8, seed=3)
    settings = recipe(
        memory__micro_batch_size=8,
        loss__nll_reduction=reduction,
        loss__completion_only_loss=only,
        loss__beta=0.5,
    )
    found, _ = gradients(model, pairs, settings)

    def token_logps(ids: Any) -> torch.Tensor:
        ids = torch.tensor([list(ids)])
        logits = model.model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]

    nll, ratio, counted = [], [], 0
    for pair in pairs:
        chosen, rejected = token_logps(pair.chosen_ids), token_logps(pair.rejected_ids)
        p_w = chosen[pair.chosen_start - 1 :].mean().exp()
        p_l = rejected[pair.rejected_start - 1 :].mean().exp()
        ratio.append(
            -torch.log(torch.sigmoid(torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l))))
        )
        terms = -chosen[pair.chosen_start - 1 :] if only == "true" else -chosen
        nll.append(terms.mean() if reduction == "pair" else terms.sum())
        counted += len(terms)
    loss = (
        torch.stack(nll).sum() / (8 if reduction == "pair" else counted)
        + 0.5 * torch.stack(ratio).mean()
    )
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [p for _, p in model.trained()])]
    )
    assert (found - expected).norm() / expected.norm() < 1e-12


def test_padding_and_neighbours_change_nothing() -> None:
    """A pair's log-probabilities beside a much longer one; and whatever id the padding has."""
    model, pairs = lora_model(tiny_llama()), ragged_pairs(6, seed=5)
    with model.evaluating():
        together = model(pad_pairs(pairs, pad_id=0, completion_only_loss=False))
        as_eos = model(pad_pairs(pairs, pad_id=2, completion_only_loss=False))
        alone = [model(pad_pairs([pair], pad_id=0, completion_only_loss=False)) for pair in pairs]
    for field in ("chosen_P", "rejected_P", "nll_P"):
        assert torch.equal(getattr(together, field), getattr(as_eos, field))
        single = torch.cat([getattr(one, field) for one in alone])
        assert (getattr(together, field) - single).abs().max() < 1e-12


def test_a_chosen_token_leaves_the_rejected_side_alone() -> None:
    model, (pair,) = lora_model(tiny_llama()), ragged_pairs(1, seed=6)
    other = [*pair.chosen_ids[:-2], (pair.chosen_ids[-2] + 1) % 96, pair.chosen_ids[-1]]
    changed = TokenizedPair(other, pair.rejected_ids, pair.chosen_start, pair.rejected_start, "")  # type: ignore[arg-type]
    with model.evaluating():
        before, after = (
            model(pad_pairs([p], pad_id=0, completion_only_loss=False)) for p in (pair, changed)
        )
    assert torch.equal(before.rejected_P, after.rejected_P)
    assert not torch.equal(before.chosen_P, after.chosen_P)


def test_eos_is_scored_and_padding_is_not_when_they_share_an_id() -> None:
    """The classic "never stops": pad = eos, masked by id."""
    pair = TokenizedPair([1, 5, 6, 2], [1, 5, 7, 8, 9, 2], 2, 2, "")  # type: ignore[arg-type]
    batch = pad_pairs([pair], pad_id=2, completion_only_loss=True)
    assert batch.input_ids_RT[0].tolist() == [1, 5, 6, 2, 2, 2]
    assert batch.response_RT[0].tolist() == [False, False, True, True, False, False]
    assert batch.attention_RT[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_divisors_count_what_the_head_counts() -> None:
    for only in (False, True):
        pairs = ragged_pairs(5)
        batch = pad_pairs(pairs, pad_id=0, completion_only_loss=only)
        counted = batch.counted_RT[:5, 1:].sum(-1).tolist()
        assert counted == [nll_tokens(pair, completion_only_loss=only) for pair in pairs]


def test_dropout_is_a_function_of_its_place() -> None:
    """The same step twice gives the same bits, whatever the generator did in between; another step differs."""
    model, pairs = lora_model(tiny_llama(), dropout=0.3), ragged_pairs(4)
    settings = recipe(memory__micro_batch_size=2)
    first, _ = gradients(model, pairs, settings)
    torch.manual_seed(987)
    again, _ = gradients(model, pairs, settings)
    assert torch.equal(first, again)
    draws = []
    for place in [(1, 2, 3), (1, 2, 4), (1, 23, 0)]:
        seed_dropout(*place)
        draws.append(torch.rand(4))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = epoch_order(100, seed=1, epoch=0)
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, seed=1, epoch=0)
    assert order != epoch_order(100, seed=1, epoch=1)
    assert order != epoch_order(100, seed=2, epoch=0)
    assert epoch_order(6, seed=42, epoch=0) == (
        1,
        0,
        3,
        2,
        5,
        4,
    )  # as any machine and version must give it


def test_shares_of_processes_cover_the_step_once() -> None:
    pairs = ragged_pairs(7)
    for world in (1, 2, 3, 8):
        for batching in (PADDED, PACKED):
            shares = [
                micro_batches(pairs, batching, rank=rank, world=world) for rank in range(world)
            ]
            assert sorted(index for share in shares for chunk in share for index in chunk) == list(
                range(7)
            )
            assert all(len(chunk) <= 2 for share in shares for chunk in share)
            assert len({*map(len, shares)}) == 1


@pytest.mark.parametrize(("count", "most"), [(16, 0.01), (8, 0.04), (4, 0.12)])
def test_processes_get_nearly_equal_numbers_of_tokens(count: int, most: float) -> None:
    """On real lengths, a process waits for a small share of the tokens of the slowest one."""
    for lengths, world in itertools.product(("hh-rlhf", "alpaca-prefs"), (2, 8, 64)):
        assert idle_share(shipped(lengths), count, world) <= most, (lengths, world)


PROCESS = """
import sys
sys.path[:0] = sys.argv[2:]
from test_step import gradients_of_processes
gradients_of_processes(sys.argv[1])
"""


OBJECTIVES = ("sft", "dpo", "reward")


def gradients_of_processes(folder: str) -> None:
    """What each of the launched processes runs: three steps' gradients, saved by the first."""
    processes = Processes(cpu=True)
    model = lora_model(tiny_llama())
    assert processes.count == 2
    saved = {}
    for reduction, only in REDUCTIONS:
        for count in (8, 7, 1):  # an uneven share; a process with no pair at all
            settings = recipe(
                memory__micro_batch_size=2,
                loss__nll_reduction=reduction,
                loss__completion_only_loss=only,
            )
            saved[f"{reduction} {count}"] = gradients(
                model, ragged_pairs(count), settings, processes
            )
    saved |= {loss: of_objective(loss, processes) for loss in OBJECTIVES}
    saved["evaluation"] = evaluation(model, processes)
    saved |= of_shared_base(folder, processes)
    saved["other inputs"] = refusals_of_other_inputs(processes)
    if processes.is_main:
        torch.save(saved, f"{folder}/gradients.pt")


def refusals_of_other_inputs(processes: Processes) -> list[str]:
    """What the first process says of the same tokens, other tokens, other held-out rows and recipes."""
    said = []
    for digest, rows in (("a", 3), (f"{processes.rank}", 3), ("a", 3 + processes.rank)):
        pairs: Any = SimpleNamespace(sha256=digest, rows=np.arange(rows))
        inputs: Any = SimpleNamespace(train=pairs, test=pairs)
        said.append(refusal(refuse_other_pairs, recipe(), inputs, processes))
    for key in ("data__test_split_size", "training__learning_rate"):  # tokens have their own hash
        settings = recipe(**{key: 0.1 + processes.rank / 10})
        said.append(refusal(refuse_other_recipes, settings, processes))
    return said


def refusal(check: Callable[..., None], *arguments: Any) -> str:
    """What a check finds; "" if nothing."""
    try:
        check(*arguments)
    except OrpoLiteError as error:
        return error.found
    return ""


def of_shared_base(folder: str, processes: Processes) -> dict[str, Any]:
    """What two processes compute that share a base in 4 bit, and that each hold the whole base."""
    saved: dict[str, Any] = {}
    base = fetch_weights(find_base(f"{folder}/base", "main"))
    for shard in ("off", "2"):
        settings = recipe(memory__micro_batch_size=2).override(
            {"model.model_name_or_path": f"{folder}/base", "quantization.load_in_4bit": True,
             "memory.shard": shard}
        )  # fmt: skip
        model = load_pair_model(settings, base, processes.device, processes)
        probe(model, 40, 200)
        # Eight pairs; and one, so that the other process has an idle pass.
        vectors = [
            gradients(model, ragged_pairs(count), settings, processes)[0] for count in (8, 1)
        ]
        saved[f"shard {shard}"] = (vectors, evaluation(model, processes), model.notes)
        if shard == "2":
            whole = sum(
                layer.quant_state.shape.numel() // 2
                for layer in model.modules()
                if hasattr(layer, "quant_state")
            )
            saved["share of the base"] = local_bytes(model) / whole
    return saved


def of_objective(loss: str, processes: Processes) -> tuple[torch.Tensor, list[float]]:
    """The gradient of seven pairs by another objective."""
    from test_objectives import LOSSES, pairs_for, settings_of

    settings = settings_of(LOSSES[loss], memory__micro_batch_size=2)
    model = lora_model(tiny_llama(), task="SEQ_CLS" if loss == "reward" else "CAUSAL_LM")
    return gradients(model, pairs_for(settings.loss, 7), settings, processes)


def evaluation(model: Any, processes: Processes) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of seven pairs, and the scores of each."""
    found = held_out.evaluate(
        model,
        find_objective(recipe().loss),
        ragged_pairs(7),
        recipe(),
        pad_id=0,
        processes=processes,
    )
    while True:
        try:
            next(found)
        except StopIteration as end:
            return end.value[0], torch.stack(end.value[1])


def test_two_processes_give_the_gradient_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Launched by accelerate, whose launcher runs here: to import it takes as long as the steps."""
    write_base(tmp_path / "base")
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # nothing here compiles; it loads for seconds
    here = Path(__file__).parent
    folders = map(str, (tmp_path, here, here.parent, here.parent / "model"))
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    options += " --dynamo_backend no --main_process_port 0"
    arguments = [*options.split(), str(script), *folders]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError:
        pytest.fail(capfd.readouterr().err[-3000:])
    saved = torch.load(tmp_path / "gradients.pt")
    model = lora_model(tiny_llama())
    for reduction, only in REDUCTIONS:
        for count in (8, 7, 1):
            settings = recipe(
                memory__micro_batch_size=8,
                loss__nll_reduction=reduction,
                loss__completion_only_loss=only,
            )
            expected, figures = gradients(model, ragged_pairs(count), settings)
            vector, parts = saved[f"{reduction} {count}"]
            assert (vector - expected).norm() / expected.norm() < 1e-12
            assert parts == pytest.approx(figures, rel=1e-12)
    for loss in OBJECTIVES:
        expected, figures = of_objective(loss, Processes(cpu=True))
        assert (saved[loss][0] - expected).norm() / expected.norm() < 1e-12
        assert saved[loss][1] == pytest.approx(figures, rel=1e-12)
    # Two processes that share a base compute the same bits as two that hold it whole.
    off, shared = saved["shard off"], saved["shard 2"]
    assert all(map(torch.equal, off[0], shared[0]))
    assert off[1][0] == shared[1][0]
    assert torch.equal(off[1][1], shared[1][1])
    assert off[2] == shared[2] == []
    assert saved["share of the base"] == 0.5
    different = "the processes have different tokens"
    another = "a process on another machine has another recipe"
    assert saved["other inputs"] == ["", different, different, "", another]
    metrics, scores = saved["evaluation"]
    expected_metrics, expected_scores = evaluation(model, Processes(cpu=True))
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert torch.allclose(scores, expected_scores, rtol=1e-6, atol=0)
    margins = expected_scores[0] - expected_scores[1]
    assert metrics["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).double().mean()))
    nll = expected_scores[2].sum() / expected_scores[3].sum()
    assert metrics["eval_nll_loss"] == pytest.approx(float(nll), rel=1e-6)


def test_a_process_without_a_pair_has_a_scaler_that_works() -> None:
    """float16: the scaler makes its state at its first use, and unscale_ refuses to run before that."""
    model, scaler = lora_model(tiny_llama()), torch.amp.GradScaler("cpu", enabled=True)
    second: Any = Processes(cpu=True)
    second.rank, second.count, second.sum = 1, 2, lambda tensor: tensor
    gradients(model, ragged_pairs(1), recipe(), second, scaler)
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trained()], lr=0.1)
    scaler.unscale_(optimizer)
    assert all(not parameter.grad.any() for _, parameter in model.trained())  # type: ignore[union-attr]


def test_the_fault_these_tests_are_for_is_seen() -> None:
    """A mean per micro-batch instead of the step's own divisors (TRL #2628, Unsloth #2055) changes the gradient."""
    model, pairs = lora_model(tiny_llama()), ragged_pairs(8)
    expected, _ = gradients(model, pairs, recipe(memory__micro_batch_size=8))
    model.zero_grad(set_to_none=True)
    for chunk in micro_batches(pairs, PADDED):
        logps = model(
            pad_pairs([pairs[index] for index in chunk], pad_id=0, completion_only_loss=False)
        )
        loss, _ = orpo_loss(logps, Divisors(2, int(logps.nll_tokens_P.sum())), beta=0.1)
        (loss / 4).backward()
    wrong = torch.cat([parameter.grad.flatten() for _, parameter in model.trained()])  # type: ignore[union-attr]
    assert (wrong - expected).norm() / expected.norm() > 1e-3
