"""The built-in base and pairs: a whole run on a fresh machine, with no hub, no GPU and no network.

The fight is fair. Every answer is a greeting, a piece of advice and a goodbye, in one of two tones, and all answers
have the same number of tokens. The base sees every phrasing of both tones equally often. How likely it finds an
answer therefore hangs on the advice (each topic has a usual one), not on the tone; and in half of the pairs the
chosen answer holds the usual advice, in the other half the rejected one does. Before training the base prefers the
chosen answer in about half of the pairs; what changes that is the training alone.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_lite.recipe.schema import Recipe

BASE = "builtin:tiny-llama"
TOKENIZER = "builtin:tiny-llama-tokenizer"  # of that base; nobody names it
PAIRS = "builtin:two-tones"
REMARK = (
    "This run used the built-in toy base and its two-tone pairs: it shows that the machinery works on this machine, "
    "not how good a model it makes. For that, choose a real base and real preferences."
)

Phrasing = tuple[str, str]  # greeting, goodbye
Card = TypeVar("Card")

# Greetings are five tokens each, goodbyes six (a word or a mark is one). Half of either end in "!", and many first
# words serve both tones, so that no single token decides between the two.
WARM: list[Phrasing] = list(
    product(
        (
            "What a lovely question!",
            "So glad you asked.",
            "Oh, wonderful idea!",
            "Happy to help you.",
            "That sounds like fun!",
            "Great that you ask.",
            "You picked something nice.",
            "I love this topic!",
        ),
        (
            "You will do really well!",
            "Enjoy every minute of it!",
            "I am cheering for you.",
            "Tell me how it goes.",
        ),
    )
)
CURT: list[Phrasing] = list(
    product(
        (
            "What, this again!",
            "So you want help.",
            "Fine, just once.",
            "Great, another question!",
            "That is rather obvious.",
            "Everyone knows that already!",
            "You could look yourself.",
            "I have no time!",
        ),
        (
            "You will manage without me.",
            "That is all from me.",
            "I will not repeat this!",
            "Please do not ask again!",
        ),
    )
)
# The topic comes last, always as far from its place in the answer: the base learns to copy it in seconds.
QUESTIONS = (
    "How do I start with {}?",
    "Can you help me with {}?",
    "What is a good way into {}?",
    "Do you have advice on {}?",
    "How can I get better at {}?",
    "Where do I begin with {}?",
    "Is it hard to learn {}?",
    "Any tips for {}?",
)
# Usual advice, also five tokens each -> the topics it is usual for.
ADVICE = {
    "join a friendly local club": (
        "tennis rowing chess hiking running volleyball badminton sailing "
        "climbing cycling swimming skating fencing dancing basketball archery"
    ).split(),
    "watch a short beginner video": (
        "pottery knitting baking sewing origami woodwork calligraphy juggling "
        "cooking gardening painting weaving embroidery carving crochet sculpture"
    ).split(),
    "read a good beginner guide": (
        "astronomy geology birdwatching photography history philosophy botany economics "
        "algebra geometry programming geography chemistry genealogy beekeeping composting"
    ).split(),
    "practise ten minutes every day": (
        "guitar piano violin singing drumming Spanish Japanese Italian "
        "drawing typing meditation yoga handwriting storytelling flute whistling"
    ).split(),
}
ADVICES = list(ADVICE)
TOPICS = [
    topic for row in zip(*ADVICE.values(), strict=True) for topic in row
]  # the usual advice of i is i % 4
TRAIN_TOPICS, TEST_TOPICS = TOPICS[:48], TOPICS[48:]
SHIFTS = (
    0,
    0,
    0,
    0,
    0,
    1,
    2,
    3,
)  # the base hears the usual advice five times in eight, each other one once

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(folder: Path, *, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Train the tiny Llama and write it to ``folder``, which must be new or empty, once the last step is done.

    Yields:
        (step, steps), after each step. The caller's random state is neither read nor changed.
    """
    return _make_base(folder, seed=seed, rounds=100)


def make_pairs(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl (384 pairs) and test.jsonl (128 pairs on other topics) to ``folder``, new or empty.

    Each line is {"prompt", "chosen", "rejected"}: chosen is warm, rejected curt, every phrasing equally often.
    """
    rng = random.Random(seed)  # noqa: S311 - chance, not secrets
    with _whole(folder) as unfinished:
        for name, topics in (("train", TRAIN_TOPICS), ("test", TEST_TOPICS)):
            prompts = list(product(enumerate(topics), enumerate(QUESTIONS)))
            warm, curt = _deal(WARM, len(prompts), rng), _deal(CURT, len(prompts), rng)
            rows = []
            for ((i, topic), (j, question)), chosen, rejected in zip(
                prompts, warm, curt, strict=True
            ):
                usual, other = ADVICES[i % 4], ADVICES[(i + rng.randint(1, 3)) % 4]
                # The usual advice is rejected as often as chosen, within each question and within each topic.
                for_chosen, for_rejected = (usual, other) if (i // 4 + j) % 2 else (other, usual)
                rows.append(
                    {
                        "prompt": question.format(topic),
                        "chosen": _answer(chosen, topic, for_chosen),
                        "rejected": _answer(rejected, topic, for_rejected),
                    }
                )
            rng.shuffle(rows)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (unfinished / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    return folder / "train.jsonl", folder / "test.jsonl"


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` at the end: what stands there is never half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as beside:
        unfinished = Path(beside) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


def _answer(phrasing: Phrasing, topic: str, advice: str) -> str:
    greeting, goodbye = phrasing
    return f"{greeting} For {topic}, {advice}. {goodbye}"


def _deal(cards: Sequence[Card], hands: int, rng: random.Random) -> list[Card]:
    """``hands`` shuffled cards, each card equally often."""
    dealt = [cards[i % len(cards)] for i in range(hands)]
    rng.shuffle(dealt)
    return dealt


def _batches(rounds: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Two batches of 32 (question, answer) a round, each half warm; a round has every phrasing and every topic once."""
    rng = random.Random(seed)  # noqa: S311 - chance, not secrets
    for turn in range(rounds):
        tones = zip(_deal(WARM, 32, rng), _deal(CURT, 32, rng), strict=True)
        phrasings = [phrasing for both in tones for phrasing in both]
        rows = []
        for (i, topic), phrasing in zip(
            _deal(list(enumerate(TOPICS)), 64, rng), phrasings, strict=True
        ):
            # Topics 4k to 4k + 3 differ in their usual advice and share a shift: no advice is the commoner one.
            advice = ADVICES[(i + SHIFTS[(i // 4 + turn) % len(SHIFTS)]) % 4]
            rows.append((rng.choice(QUESTIONS).format(topic), _answer(phrasing, topic, advice)))
        yield rows[:32]
        yield rows[32:]


def _tokenizer() -> PreTrainedTokenizerFast:
    """Each word of ours is one token; any other text falls back to bytes, so nothing is ever unknown."""
    texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    texts += [
        _answer(phrasing, topic, advice)
        for phrasing, topic, advice in product(WARM + CURT, TOPICS[:1], ADVICES)
    ]
    tokens = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 14,  # never reached: merging ends when every word is whole
        min_frequency=1,
        show_progress=False,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=tokens[0],
        bos_token=tokens[1],
        eos_token=tokens[2],
        extra_special_tokens=tokens[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # every matrix is a multiple of NF4's block of 64
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.09,  # 1/sqrt(hidden_size): learns in half the steps that 0.02 takes
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would also reseed the GPUs, which are not forked
        return LlamaForCausalLM(_config(tokenizer))


def _make_base(folder: Path, *, seed: int, rounds: int) -> Iterator[tuple[int, int]]:
    tokenizer = _tokenizer()
    model = _model(tokenizer, seed)
    steps = 2 * rounds
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    # Up fast, then down to zero: the last steps average out which phrasing happened to come last.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=steps, pct_start=0.1
    )
    for step, batch in enumerate(_batches(rounds, seed), start=1):
        turns = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in batch
        ]
        inputs = tokenizer(
            tokenizer.apply_chat_template(turns, tokenize=False),
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        # Padding on the right needs no mask: nothing real looks back at it, and its own labels do not count.
        labels_BT = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        with _one_thread():
            model(input_ids=inputs.input_ids, labels=labels_BT, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, steps
    with _whole(folder) as unfinished:
        # Not model.save_pretrained, which draws a progress bar of its own.
        save_file(model.state_dict(), unfinished / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=64,
        ).save_pretrained(unfinished)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from more threads, lose much when cores are busy; and the bits stay the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_builtin(recipe: Recipe, *, weights: bool = True) -> Iterator[tuple[int, int]]:
    """Make the ``builtin:`` base and pairs that a recipe names, unless they are there; yields (step, steps).

    Without ``weights`` the base is its tokenizer and configuration, which take no training.
    """
    if recipe.model.model_name_or_path == BASE and not _folder(recipe, BASE).is_dir():
        if weights:
            yield from make_base(_folder(recipe, BASE))
        elif not _folder(recipe, TOKENIZER).is_dir():
            with _whole(_folder(recipe, TOKENIZER)) as unfinished:
                tokenizer = _tokenizer()
                tokenizer.save_pretrained(unfinished)
                _config(tokenizer).save_pretrained(unfinished)
    if recipe.data.dataset_name == PAIRS and not _folder(recipe, PAIRS).is_dir():
        make_pairs(_folder(recipe, PAIRS))


def resolve_builtin(recipe: Recipe) -> Recipe:
    """The recipe with the folders of :func:`make_builtin` in place of the ``builtin:`` names."""
    values = {}
    if recipe.model.model_name_or_path == BASE:
        made = [folder for name in (BASE, TOKENIZER) if (folder := _folder(recipe, name)).is_dir()]
        values["model.model_name_or_path"] = str((made or [_folder(recipe, BASE)])[0])
    if recipe.data.dataset_name == PAIRS:
        values["data.dataset_name"] = str(_folder(recipe, PAIRS) / "train.jsonl")
        values["data.dataset_test_split"] = recipe.data.dataset_test_split or str(
            _folder(recipe, PAIRS) / "test.jsonl"
        )
    return recipe.override(values)


def builtin_remark(recipe: Recipe) -> str:
    """What to say at the end of a run on built-in parts; "" for any other."""
    return (
        REMARK
        if recipe.model.model_name_or_path == BASE or recipe.data.dataset_name == PAIRS
        else ""
    )


def _folder(recipe: Recipe, name: str) -> Path:
    """Beside the run folder, shared by its siblings; the name changes with this file, so nothing stale is read."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return (
        Path(recipe.training.output_dir).parent
        / "builtin"
        / f"{name.removeprefix('builtin:')}-{source}"
    )
