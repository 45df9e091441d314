"""Answer prompts with a loaded model: many prompts in a batch, or one prompt as a stream."""

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
from orpo_lite.model.sharding import from_first, is_sharded
from orpo_lite.ops.devices import is_lost, is_on_host, is_out_of_memory
from orpo_lite.ops.layers import embed_on_device, embed_on_host

CACHE_BYTES = 2 << 30  # largest size of the keys and values of one batch
ROWS = 64  # largest number of prompts in one batch
# Padding may change the logits by this much, in standard deviations of the logits. The rounding of
# sums changes them less. A wrong position, or attention to padding, changes them more.
SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Decoding:
    """Settings for how the tokens of an answer are chosen."""

    max_new_tokens: int
    """Largest number of tokens in an answer. An answer also ends at the model's last position."""
    temperature: float = 0.0
    """Temperature of the sampling. 0: always choose the most likely token."""
    seed: int = 42
    """The seed of sampled answers. A sampled answer depends on the seed and on its own prompt. The
    other prompts of a batch change it only through the rounding of sums."""


class Answerer:
    """Answers prompts with a model, greedily or by sampling, in batches or as a stream.

    Args:
        model: a model that a training or :mod:`orpo_lite.evaluation.open_run` has loaded.
            Answering does not change its weights, its mode or torch's random generators.
        generation: a generation config with the tokens that end an answer
            (:func:`orpo_lite.base.generation.with_ends`). Its settings for beams, stop strings and
            outputs are ignored.
        tokens: largest number of tokens in a batch, prompts and answers together. None: the number
            of tokens whose keys and values fit into :data:`CACHE_BYTES`.
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
        """Return the largest possible number of tokens in the answer to a prompt.

        Prompt and answer together cannot have more tokens than the model has positions. The result
        is 0 for an empty prompt, and 0 or less for a prompt that is too long.
        """
        return self.positions - len(prompt) if len(prompt) else 0

    def batches(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """Divide the prompts into batches, the longest prompts first. Return lists of indices.

        After a long prompt, the model may have too few positions for ``limit`` more tokens
        (:meth:`room`). Such a prompt is alone in its batch, because all answers of a batch have the
        same largest length. A prompt is left out if the model has no position for its answer.

        The same model, prompts and limit always give the same batches, so a repeated command gives
        the same answers.

        Args:
            prompts: the tokens of each prompt.
            limit: largest number of tokens in an answer.
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
        """Answer the prompts. Yield the answers of each batch as {index of a prompt: tokens}.

        The tokens do not include the end token. If the GPU is out of memory, a batch is split into
        halves, down to single prompts, unless processes share the base.

        Args:
            prompts: the tokens of each prompt.
            decoding: how the answers are chosen.
            adapter: if False, the base answers without the adapter.
            done: indices of prompts that already have an answer. A batch is skipped if all its
                prompts already have an answer.
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
            # Processes that share the base must run the same passes, so none can retry alone.
            if not is_out_of_memory(error) or len(prompts) == 1 or is_sharded(self.model):
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
        # generate() takes the largest score, and _Sampler makes it a sample. transformers' own
        # sampling cannot use one random generator for each row.
        processors: list[Any] = []
        if decoding.temperature:
            processors.append(_Sampler(prompts, self.sampling, decoding))
        if is_sharded(self.model):
            processors.append(_of_first_process)
        output = self._generate(prompts, limit, logits_processor=processors, **options)
        return [self._without_end(row) for row in output.sequences.tolist()]

    def _without_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:end]

    def _generate(
        self, prompts: Sequence[Sequence[int]], limit: int, *, stops: bool = True, **options: Any
    ) -> Any:
        """Return the output of transformers for prompts of any lengths, with only the new tokens.

        If ``stops`` is False, end tokens are ignored: each answer has ``limit`` tokens. The output
        then has their logits.
        """
        width, device = max(map(len, prompts)), self.model.device
        # Pad on the left, so that the last column holds the last token of each prompt.
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
        """The reason why this model cannot answer prompts in a padded batch; "" if it can.

        A test makes three random prompts of different lengths, and a random answer to each. The
        model reads them twice: all prompts in one padded batch, and one prompt at a time. The
        logits of the answers must be equal within :data:`SAME`.
        """
        numbers = torch.Generator().manual_seed(0)
        vocabulary = min(256, self.model.config.get_text_config().vocab_size)
        lengths, steps = (4, 9, 23), 3
        if self.positions <= max(lengths) + steps:
            return "the model has very few positions"
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
            if is_out_of_memory(error) or is_lost(error):
                raise
            return f"the model's code fails for padded rows ({first_line(error)[:80]})"
        difference = (together_SRV - alone_SRV).std() / alone_SRV.std()
        is_same = difference <= SAME.get(self.model.causal.dtype, SAME[torch.bfloat16])
        if is_same:
            return ""
        return (
            f"padding changes the model's logits by {float(difference):.2g} of their standard "
            "deviation"
        )

    @property
    def note(self) -> str:
        """A note that says why prompts are answered one at a time; "" if batches are possible."""
        fault = self.padding_fault
        return f"the prompts are answered one at a time, because {fault}" if fault else ""

    def _forced(self, prompts: Sequence[Sequence[int]], given_RS: Tensor) -> Tensor:
        """Generate the given tokens of S steps. Return the logits of each step, shape (S, R, V)."""
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
        """Yield the text of an answer piece by piece. Pieces end at spaces if the text has spaces.

        transformers' ``generate`` runs in a thread. The thread ends at its next token if this
        generator is closed, or if an exception such as KeyboardInterrupt is raised in this
        generator.
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
    """Return the seed for sampling the answer to ``prompt``, a number below 2**32.

    The result depends only on ``seed`` and on the tokens of ``prompt``.
    """
    text = f"{seed} {[int(token) for token in prompt]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


class _Sampler:
    """A logits processor that samples: the token with the largest returned score is the sample.

    It divides the probabilities by exponential noise, as ``torch.multinomial`` does. Each row has
    its own random generator, while the sampling of transformers has one for all rows.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], decoding: Decoding
    ) -> None:
        # Generators on the CPU make the same noise for any device.
        self.generators = [
            torch.Generator().manual_seed(prompt_seed(decoding.seed, prompt)) for prompt in prompts
        ]
        # The order and the default of top_k are those of transformers.
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


def _of_first_process(_input_ids: Tensor, scores: Tensor) -> Tensor:
    """Give the first process's token the largest score, so that all processes go on equally.

    Processes that share the base must run the same passes, but their rounding may differ.
    """
    tokens_R1 = from_first(scores.argmax(-1, keepdim=True))
    return torch.zeros_like(scores).scatter_(1, tokens_R1, 1.0)


class _Forced:
    """A logits processor that makes the given token of each step the most likely one."""

    def __init__(self, given_RS: Tensor) -> None:
        self.given_RS, self.step = given_RS, 0

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens_R = self.given_RS[:, self.step].to(scores.device)
        self.step += 1
        return torch.zeros_like(scores).scatter_(1, tokens_R.unsqueeze(1), 1.0)


class _Stopped:
    """A stopping criterion that stops when another thread sets an event."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        is_stopped = self.event.is_set()
        return torch.full((len(input_ids),), is_stopped, device=input_ids.device)


@contextmanager
def _ready(model: PairModel) -> Iterator[None]:
    """Prepare a model for ``generate`` of transformers inside the ``with`` block.

    An embedding in host memory is moved to the GPU, because ``generate`` allocates on the device of
    the first parameter. Deterministic algorithms (``training.full_determinism``) are switched off,
    because sampling needs a sum that has no deterministic kernel on a GPU.
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
    """Return the bytes of one token's keys and values in all layers.

    ``config`` is the model's text configuration.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * shared * width * dtype.itemsize)
