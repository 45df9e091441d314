"""Answer prompts with a loaded model: many in one batch with a KV cache, or one as a stream."""

import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    TextIteratorStreamer,
)
from transformers.generation import logits_process

from orpo_lite.base.generation import SAMPLING
from orpo_lite.errors import first_line
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel
from orpo_lite.ops.devices import is_on_host, is_out_of_memory
from orpo_lite.ops.layers import embed_on_device, embed_on_host

CACHE_BYTES = 2 << 30  # of the keys and values of one batch
ROWS = 64  # most prompts in one batch
# What a padded row may change in the logits, in their standard deviations: another order of sums
# does less, a wrong position or a padding token that is attended to does more.
SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen."""

    max_new_tokens: int
    """Most tokens of an answer; fewer where the model has no more positions."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    seed: int = 42
    """A sampled answer depends on it and on the tokens of its own prompt, not on others in the
    batch, apart from the rounding of sums."""


class Answerer:
    """Continues prompts with a model: greedily or by sampling, many at a time.

    Args:
        model: as a training or :mod:`orpo_lite.evaluation.open_run` loaded it. Its weights, its
            mode and torch's generators are the same after an answer as before it.
        generation: a generation config with the tokens that end an answer
            (:func:`orpo_lite.base.generation.with_ends`). Its beams, stop strings and outputs are
            not used.
        tokens: most tokens of a batch, prompts and answers together; None: as many as have their
            keys and values in :data:`CACHE_BYTES`.
    """

    def __init__(
        self, model: PairModel, generation: Mapping[str, Any], *, tokens: int | None = None
    ) -> None:
        self.model = model
        self.sampling = {
            key: generation[key] for key in SAMPLING if generation.get(key) is not None
        }
        ends = generation.get("eos_token_id")
        self.ends = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
        self.pad_id = generation.get("pad_token_id") or 0
        text_config = model.config.get_text_config()
        self.positions: int = getattr(text_config, "max_position_embeddings", None) or 1 << 30
        self.tokens = tokens or CACHE_BYTES // _cache_bytes(text_config, model.causal.dtype)

    def room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens an answer can have before the model's positions end.

        There is none for an empty prompt.
        """
        return self.positions - len(prompt) if len(prompt) else 0

    def batches(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """Return the prompts' indices in batches, the longest prompts first.

        Prompts for which the positions end before ``limit`` are alone, so that no answer is cut
        for the prompts next to it. Prompts without any room are left out. The batches depend on the
        prompts only: a command that is repeated makes the same ones.
        """
        found: list[list[int]] = []
        width = 0
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            room = self.room(prompts[index])
            if room < 1:
                continue
            size = len(found[-1]) + 1 if found else 0
            fits = 1 < size <= ROWS and size * width <= self.tokens
            if fits and room >= limit and not self.padding_fault:
                found[-1].append(index)
                continue
            found.append([index])
            width = len(prompts[index]) + limit if room >= limit else self.tokens + 1
        return found

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        adapter: bool = True,
        done: Collection[int] = (),
    ) -> Iterator[dict[int, list[int]]]:
        """Yield the answers of each batch, by the prompts' indices; without the end's token.

        Without ``adapter`` they are the base's. Batches whose prompts are all ``done`` are skipped.
        If the GPU is out of memory, the halves of a batch are tried, down to single prompts.
        """
        for rows in self.batches(prompts, decoding.max_new_tokens):
            if all(index in done for index in rows):
                continue
            with nullcontext() if adapter else self.model.without_adapter():
                answers = self._answer_batch({index: prompts[index] for index in rows}, decoding)
            yield answers

    def _answer_batch(
        self, prompts: Mapping[int, Sequence[int]], decoding: Decoding
    ) -> dict[int, list[int]]:
        try:
            return dict(zip(prompts, self._run([*prompts.values()], decoding), strict=True))
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(prompts) == 1:
                raise
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        items, half = [*prompts.items()], len(prompts) // 2
        return self._answer_batch(dict(items[:half]), decoding) | self._answer_batch(
            dict(items[half:]), decoding
        )

    def _run(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, **options: Any
    ) -> list[list[int]]:
        limit = min(decoding.max_new_tokens, *map(self.room, prompts))
        # The sampler chooses by the largest score, so that each row has a generator of its own.
        processors = [_Sampler(prompts, self.sampling, decoding)] if decoding.temperature else []
        output = self._generate(prompts, limit, logits_processor=processors, **options)
        return [self._without_end(row) for row in output.sequences.tolist()]

    def _without_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:end]

    def _generate(
        self, prompts: Sequence[Sequence[int]], limit: int, *, stops: bool = True, **options: Any
    ) -> Any:
        """Return transformers' output for prompts of any lengths; only the new tokens are in it.

        Without ``stops`` all ``limit`` tokens are made, and the output has their logits.
        """
        width, device = max(map(len, prompts)), self.model.device
        # On the left, so that each row goes on at its end.
        ids_RT = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        mask_RT = torch.zeros_like(ids_RT)
        for row, prompt in enumerate(prompts):
            ids_RT[row, width - len(prompt) :] = torch.tensor([*prompt])
            mask_RT[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=not stops,
            max_new_tokens=limit,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.ends) or None if stops else None,
            repetition_penalty=self.sampling.get("repetition_penalty") if stops else None,
        )
        with self.model.evaluating(), _ready(self.model):
            output = self.model.causal.generate(
                ids_RT.to(device),
                attention_mask=mask_RT.to(device),
                generation_config=config,
                **options,
            )
        output.sequences = output.sequences[:, width:]
        return output

    @cached_property
    def padding_fault(self) -> str:
        """Why prompts cannot share a batch with this model; "" if they can.

        Random prompts of several lengths are continued by given tokens, in one padded batch and
        one at a time. Both must have the same logits, within :data:`SAME`.
        """
        numbers = torch.Generator().manual_seed(0)
        vocabulary = min(256, self.model.config.get_text_config().vocab_size)
        lengths, steps = (4, 9, 23), 3
        if self.positions <= max(lengths) + steps:
            return "it has very few positions"
        made = [
            torch.randint(vocabulary, (length + steps,), generator=numbers).tolist()
            for length in lengths
        ]
        prompts = [ids[:-steps] for ids in made]
        given = torch.tensor([ids[-steps:] for ids in made])
        try:
            together_SRV = self._forced(prompts, given)
            alone_SRV = torch.cat(
                [self._forced([ids], given[row : row + 1]) for row, ids in enumerate(prompts)], 1
            )
        except MODEL_CODE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return f"its code does not take padded rows ({first_line(error)[:80]})"
        difference = (together_SRV - alone_SRV).std() / alone_SRV.std()
        is_same = difference <= SAME.get(self.model.causal.dtype, SAME[torch.bfloat16])
        return "" if is_same else f"padding changes its logits by {float(difference):.2g}"

    @property
    def note(self) -> str:
        """A sentence for people if prompts are answered one at a time; else ""."""
        fault = self.padding_fault
        return f"prompts are answered one at a time: with this model {fault}" if fault else ""

    def _forced(self, prompts: Sequence[Sequence[int]], given_RS: Tensor) -> Tensor:
        """Return the logits that precede each of the given tokens, of shape (S, R, V)."""
        forced = [_Forced(given_RS)]
        output = self._generate(prompts, given_RS.shape[1], stops=False, logits_processor=forced)
        return torch.stack(output.logits).float()

    def stream(
        self,
        prompt: Sequence[int],
        decoding: Decoding,
        tokenizer: Any,
        *,
        adapter: bool = True,
    ) -> Iterator[str]:
        """Yield the text of an answer piece by piece; a piece ends at a space where there are any.

        transformers' own loop runs in a thread. It ends at its next token when this generator is
        closed, or when an exception such as KeyboardInterrupt is raised in it.
        """
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, errors = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                options = {"streamer": streamer, "stopping_criteria": [_Stopped(stopped)]}
                with nullcontext() if adapter else self.model.without_adapter():
                    self._run([prompt], decoding, **options)
            except BaseException as error:
                errors.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """Return the seed of the generator that samples the answer to a prompt, below 2**32."""
    text = f"{seed} {[int(token) for token in prompt]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


class _Sampler:
    """A logits processor: it turns logits into scores whose largest is a sample of their softmax.

    Probabilities are divided by exponential noise, as ``torch.multinomial`` does. transformers'
    sampling has one generator for all rows; here each row has its own.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], decoding: Decoding
    ) -> None:
        # On the CPU, so that the noise is the same for any device.
        self.generators = [
            torch.Generator().manual_seed(prompt_seed(decoding.seed, prompt)) for prompt in prompts
        ]
        # In transformers' order, and with its default of top_k.
        make = {
            "temperature": logits_process.TemperatureLogitsWarper,
            "top_k": logits_process.TopKLogitsWarper,
            "top_p": logits_process.TopPLogitsWarper,
            "min_p": logits_process.MinPLogitsWarper,
            "typical_p": logits_process.TypicalLogitsWarper,
        }
        values = {"top_k": 50, **sampling, "temperature": float(decoding.temperature)}
        unused = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": None}
        self.warpers = [
            warper(values[name])
            for name, warper in make.items()
            if values.get(name) not in (None, unused[name])
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        probabilities_RV = scores.softmax(-1)
        noise_RV = torch.empty_like(probabilities_RV, device="cpu")
        for noise_V, generator in zip(noise_RV, self.generators, strict=True):
            noise_V.exponential_(1, generator=generator)
        return probabilities_RV / noise_RV.to(scores.device)


class _Forced:
    """A logits processor: it makes given tokens the likeliest, step by step."""

    def __init__(self, given_RS: Tensor) -> None:
        self.given_RS, self.step = given_RS, 0

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens_R = self.given_RS[:, self.step].to(scores.device)
        self.step += 1
        return torch.zeros_like(scores).scatter_(1, tokens_R.unsqueeze(1), 1.0)


class _Stopped:
    """A stopping criterion: an event that another thread sets."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        is_stopped = self.event.is_set()
        return torch.full((len(input_ids),), is_stopped, device=input_ids.device)


@contextmanager
def _ready(model: PairModel) -> Iterator[None]:
    """Set what ``generate`` needs inside the ``with`` block.

    generate() allocates on the device of the first parameter, which may be the embedding in host
    memory. Sampling needs a sum that has no deterministic kernel on a GPU (full_determinism).
    """
    embedding = model.causal.get_input_embeddings()
    is_moved = is_on_host(embedding.weight) and "forward" in vars(embedding)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    if is_moved:
        embed_on_device(embedding, model.device)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
        if is_moved:
            embed_on_host(embedding)


def _cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token, by a model's text configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * shared * width * dtype.itemsize)
