"""PPO: sample answers, score them, and update policy and value model on them.

Policy, value model, reward model and reference model are adapters on one base, so no second model
is loaded. A step samples an answer to each of its prompts, and then takes several updates on these
answers. Its result depends only on the recipe, the data, the step's number and the weights.
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orpo_lite.data.packing import Batching, PackedPairs, epoch_order, micro_batches, pack_pairs
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.generate import Answerer, Decoding
from orpo_lite.model.held_out import score
from orpo_lite.model.pair_model import VALUE
from orpo_lite.model.ppo_adapters import REWARD, use_reference
from orpo_lite.objectives.ppo import (
    adapted_kl_coef,
    advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState
from orpo_lite.training.step import end_step, set_learning_rate, update
from orpo_lite.updates import Update, staged

MAX_HELD_OUT = 64
"""Largest number of held-out prompts that an evaluation answers."""


@dataclass(frozen=True)
class Rollout:
    """R sampled answers, with what is known about them before the first update. N: all tokens."""

    answers: Sequence[TokenizedPair]
    """The chosen sequence is prompt and answer. There is no rejected sequence."""
    scores_R: Tensor
    """The reward model's scores."""
    chunks: Sequence[Sequence[int]]
    """Indices of the answers of each forward pass. The tokens N have this order of answers."""
    logps_N: Tensor
    """Log-probability of each token under the policy that sampled it."""
    ref_N: Tensor
    """Log-probability of each token under the reference model."""
    values_N: Tensor

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each answer, in the order of the tokens."""
        return [
            len(self.answers[index].chosen_ids) - self.answers[index].chosen_start
            for chunk in self.chunks
            for index in chunk
        ]

    @property
    def kl(self) -> float:
        """The mean over answers of the sum over tokens of policy minus reference, in nats."""
        return float((self.logps_N - self.ref_N).sum() / len(self.answers))

    def scores_in_order(self) -> Tensor:
        """Return the scores in the order of the tokens, shape (R,)."""
        order = [index for chunk in self.chunks for index in chunk]
        return self.scores_R[torch.tensor(order, device=self.scores_R.device)]


def take_ppo_step(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> tuple[dict[str, float], bool]:
    """Sample an answer to the prompt of each pair, and update policy and value model on them.

    Returns:
        The step's metrics with TRL's names, and whether all losses and gradients were finite.
    """
    began = time.monotonic()
    loss = session.recipe.loss
    set_learning_rate(session, state.step)
    kl_coef = loss.kl_coef if state.kl_coef is None else state.kl_coef
    with session.pair_model.without_dropout():
        rollout = _roll_out(session, batch, seed=(session.recipe.training.seed, state.step))
        updates = [*_updates(session, rollout, kl_coef, state.step)]
    state.kl_coef = adapted_kl_coef(
        kl_coef, rollout.kl, loss.kl_target, len(rollout.answers), loss.kl_horizon
    )
    finite = all(done.finite for done in updates)
    metrics = _rollout_metrics(rollout, kl_coef) | _update_metrics(updates)
    metrics["objective/kl_coef"] = kl_coef
    tokens = sum(len(pair.chosen_ids) for pair in rollout.answers)
    return metrics | end_step(session, state, tokens, began, finite=finite), finite


def evaluate_ppo(
    session: Session,
) -> Generator[Update, None, tuple[dict[str, float], Sequence[Tensor]]]:
    """Answer held-out prompts, and score all held-out pairs. Yield updates.

    Returns:
        Metrics with names such as ``eval_objective/scores``; {} without held-out pairs. The loss
        is the negative mean of the rewards with the KL penalty of ``loss.kl_coef``.

        The log-probabilities of the held-out pairs, as those of the other objectives.
    """
    inputs, model, recipe = session.inputs, session.pair_model, session.recipe
    task = score(model, inputs.test, recipe, pad_id=inputs.pad_id, processes=session.processes)
    scores = yield from staged(f"evaluating {len(inputs.test):,} held-out pairs", task)
    first = dict(zip(inputs.test.prompts()[::-1], range(len(inputs.test))[::-1], strict=True))
    pairs = [inputs.test[index] for index in sorted(first.values())[:MAX_HELD_OUT]]
    if not pairs:
        return {}, scores
    yield Update("stage", f"answering {len(pairs)} held-out prompts")
    with model.without_dropout():
        rollout = _roll_out(session, pairs, seed=(recipe.training.seed,))
    metrics = _rollout_metrics(rollout, recipe.loss.kl_coef)
    return {f"eval_{name}": value for name, value in metrics.items()}, scores


def _roll_out(session: Session, pairs: Sequence[TokenizedPair], seed: tuple[int, ...]) -> Rollout:
    """Sample an answer to the prompt of each pair, and score the answers."""
    model, recipe = session.pair_model, session.recipe
    answers = _sample(session, pairs, seed)
    ended = _with_ends(session, answers)
    temperature = recipe.loss.temperature
    batching = _batching(session)
    size = recipe.loss.ppo_mini_batch_size
    chunks: list[list[int]] = []
    for start in range(0, len(answers), size):
        # The passes of the first epoch: so the ratio is exactly 1 before the first update.
        part = answers[start : start + size]
        chunks += [[start + index for index in chunk] for chunk in micro_batches(part, batching)]
    scores_R = torch.zeros(len(answers), device=model.device)
    logps, refs, values = [], [], []
    for chunk in chunks:
        rows = _pack([answers[index] for index in chunk], session)
        # With gradients, although they are not used: without them, other kernels may round
        # differently.
        logps.append(model.score(rows, model.route, temperature).detach())
        with torch.no_grad():
            with use_reference(model):
                refs.append(model.score(rows, model.route, temperature))
            with model.using(VALUE):
                values.append(model.values(rows))
            with model.using(REWARD):
                rewarded = _pack([ended[index] for index in chunk], session)
                scores_R[chunk] = model.rewards(rewarded)[0].to(scores_R.dtype)
    return Rollout(answers, scores_R, chunks, torch.cat(logps), torch.cat(refs), torch.cat(values))


def _sample(
    session: Session, pairs: Sequence[TokenizedPair], seed: tuple[int, ...]
) -> list[TokenizedPair]:
    """Return a sampled answer to the prompt of each pair.

    Pairs with the same prompt get different answers.
    """
    loss, inputs = session.recipe.loss, session.inputs
    # top_k 0: the whole distribution is sampled.
    generation = {"eos_token_id": inputs.end_id, "pad_token_id": inputs.pad_id, "top_k": 0}
    answerer = Answerer(session.pair_model, generation, tokens=session.recipe.micro_batch_tokens)
    prompts = [[*map(int, pair.chosen_ids[: pair.chosen_start])] for pair in pairs]
    found: dict[int, list[int]] = {}
    for number, rows in enumerate(_without_repeats(prompts)):
        decoding = Decoding(loss.response_length, loss.temperature, _number((*seed, number)))
        for batch in answerer.answer([prompts[row] for row in rows], decoding):
            found |= {rows[index]: ids for index, ids in batch.items()}
    answers = []
    for row, pair in enumerate(pairs):
        ids = found[row]
        room = min(loss.response_length, answerer.room(prompts[row]))
        end = [inputs.end_id] if len(ids) < room else []
        start = len(prompts[row])
        answers.append(
            TokenizedPair(prompts[row] + ids + end, [], start, 0, pair.where, pair.prompt)
        )
    return answers


def _with_ends(session: Session, answers: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return the answers as the reward model reads them: each ends with the end token.

    The score head was trained at the end token, and `orpo-lite score` reads it there. If an answer
    was cut at the model's last position, the end token takes the place of its last token.
    """
    end_id, config = session.inputs.end_id, session.pair_model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    return [
        answer
        if answer.chosen_ids[-1] == end_id
        else replace(answer, chosen_ids=[*answer.chosen_ids[: positions - 1], end_id])
        for answer in answers
    ]


def _number(place: Sequence[int]) -> int:
    """Return a seed that depends on all numbers of ``place``."""
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=4).digest()
    return int.from_bytes(digest)


def _without_repeats(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Divide the indices of prompts into groups in which no prompt appears twice."""
    groups: list[list[int]] = []
    counts: dict[tuple[int, ...], int] = {}
    for index, prompt in enumerate(prompts):
        number = counts.get(tuple(prompt), 0)
        counts[tuple(prompt)] = number + 1
        if number == len(groups):
            groups.append([])
        groups[number].append(index)
    return groups


def _batching(session: Session) -> Batching:
    """Return the rules for dividing answers into passes."""
    batching = session.pair_model.batching(session.recipe, session.inputs.pad_id)
    return replace(batching, packed=True)


def _pack(answers: Sequence[TokenizedPair], session: Session) -> PackedPairs:
    """Return answers in one row on the model's device. Only their own tokens are scored."""
    rows = pack_pairs(answers, completion_only_loss=True, share=False)
    return rows.to(session.pair_model.device)


@dataclass(frozen=True)
class _Updated:
    """The figures of one update, as means over its tokens."""

    policy: float
    value: float
    ratio: float
    clipped: float
    """Share of tokens whose loss is the clipped one, because it is larger."""
    kl: float
    """Half of the mean squared difference of new and old log-probabilities."""
    norm: float
    """Norm of the gradients before clipping."""
    finite: bool


def _updates(session: Session, rollout: Rollout, kl_coef: float, step: int) -> Iterator[_Updated]:
    """Take the updates of a step, and yield the figures of each."""
    loss, lengths = session.recipe.loss, rollout.lengths
    kl_N = (rollout.logps_N - rollout.ref_N).double()
    rewards_N = token_rewards(rollout.scores_in_order(), kl_N, lengths, kl_coef)
    values_N = rollout.values_N.double()
    advantages_N = advantages(rewards_N, values_N, lengths, loss.gamma, loss.lam)
    returns_N = advantages_N + values_N
    kept = (rollout.logps_N, rollout.values_N, whitened(advantages_N), returns_N)
    by_answer: dict[int, list[Tensor]] = {}
    order = [index for chunk in rollout.chunks for index in chunk]
    dtype = rollout.logps_N.dtype
    parts = zip(*(torch.split(part_N.to(dtype), lengths) for part_N in kept), strict=True)
    for index, tokens in zip(order, parts, strict=True):
        by_answer[index] = list(tokens)
    size, count = loss.ppo_mini_batch_size, len(rollout.answers)
    for epoch in range(loss.num_ppo_epochs):
        shuffled: Sequence[int] = range(count)
        if epoch:
            shuffled = epoch_order(count, seed=session.recipe.training.seed + step, epoch=epoch)
        for start in range(0, count, size):
            yield _update_on(session, rollout, by_answer, shuffled[start : start + size])


def _update_on(
    session: Session,
    rollout: Rollout,
    by_answer: dict[int, list[Tensor]],
    chosen: Sequence[int],
) -> _Updated:
    """Update policy and value model on some of the answers."""
    model, loss, batching = session.pair_model, session.recipe.loss, _batching(session)
    answers = [rollout.answers[index] for index in chosen]
    total = sum(len(by_answer[index][0]) for index in chosen)
    sums_5 = torch.zeros(5, dtype=torch.float64, device=model.device)
    for chunk in micro_batches(answers, batching):
        rows = _pack([answers[index] for index in chunk], session)
        known = [by_answer[chosen[index]] for index in chunk]
        old_N, old_values_N, advantages_N, returns_N = (
            torch.cat(parts) for parts in zip(*known, strict=True)
        )
        logps_N = model.score(rows, model.route, loss.temperature)
        policy_N, ratio_N = policy_loss(logps_N, old_N, advantages_N, loss.cliprange)
        session.processes.backward(session.scaler.scale(policy_N.sum() / total))
        with model.using(VALUE):
            value_N = value_loss(model.values(rows), old_values_N, returns_N, loss.cliprange_value)
            share = loss.vf_coef * value_N.sum() / total
            session.processes.backward(session.scaler.scale(share))
        with torch.no_grad():
            clipped_N = policy_N > -advantages_N * ratio_N
            kl_N = 0.5 * (logps_N - old_N) ** 2
            tokens = (policy_N, value_N, ratio_N, clipped_N, kl_N)
            sums_5 += torch.stack([part_N.double().sum() for part_N in tokens])
    policy, value, ratio, clipped, kl = (sums_5 / total).tolist()
    norm, finite = update(
        session.trained,
        session.optimizer,
        session.scaler,
        policy + loss.vf_coef * value,
        session.recipe.training.max_grad_norm,
    )
    return _Updated(policy, value, ratio, clipped, kl, norm, finite)


def _rollout_metrics(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """Return the metrics of sampled answers: TRL's names, and ``loss``."""
    score_, kl = float(rollout.scores_R.mean()), rollout.kl
    return {
        "loss": kl_coef * kl - score_,
        "objective/scores": score_,
        "objective/scores_std": float(rollout.scores_R.std(unbiased=False)),
        "objective/kl": kl,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score_ - kl_coef * kl,
        "objective/length": sum(rollout.lengths) / len(rollout.answers),
        "objective/entropy": float(-rollout.logps_N.sum() / len(rollout.answers)),
    }


def _update_metrics(updates: Sequence[_Updated]) -> dict[str, float]:
    """Return the metrics of the updates of a step, with TRL's names."""
    names = {
        "loss/policy_avg": "policy",
        "loss/value_avg": "value",
        "policy/approxkl_avg": "kl",
        "policy/clipfrac_avg": "clipped",
        "val/ratio": "ratio",
        "grad_norm": "norm",
    }
    return {
        key: sum(getattr(done, name) for done in updates) / len(updates)
        for key, name in names.items()
    } | {"val/ratio_first": updates[0].ratio}
