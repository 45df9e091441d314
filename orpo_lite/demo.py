"""Create a small base model and preference pairs, for a complete run without hub, GPU or network.

The base does not prefer the chosen answers before the training. An answer is a greeting, a piece of
advice and a goodbye, in a warm or a curt tone. All answers have the same number of tokens. The base
is trained on all phrasings of both tones equally often, so its probability for an answer does not
depend on the tone. The probability depends on the advice. For each topic, the base has seen one
advice more often than others: the usual advice.

In a pair, the chosen answer is warm, and the rejected answer is curt. The chosen answer has the
usual advice in half of the pairs, and the rejected answer has the usual advice in the other half.
So the base prefers the chosen answer in about half of the pairs. Only the training on the pairs
changes this share.
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
TOKENIZER = "builtin:tiny-llama-tokenizer"  # the tokenizer of BASE, only for internal use
PAIRS = "builtin:two-tones"
REMARK = (
    "This run used the built-in base or pairs. It shows that orpo-lite works on this machine. It "
    "does not show how good a model becomes: for that, choose a real base and real pairs."
)

Phrasing = tuple[str, str]  # greeting, goodbye
Item = TypeVar("Item")

# A greeting has five tokens, and a goodbye has six. A word or a punctuation mark is one token. No
# single token shows the tone: half of the greetings and half of the goodbyes end in "!", and many
# first words occur in both tones.
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
# The topic is the last word of a question. So its distance to the topic in the answer is constant,
# and the base learns in seconds to copy it.
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
# Advice (five tokens) -> the topics that have it as their usual advice.
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
]  # the usual advice of topic i has index i % 4
TRAIN_TOPICS, TEST_TOPICS = TOPICS[:48], TOPICS[48:]
# If a topic occurs eight times in the base's training, five answers have its usual advice, and each
# of the three others is in one answer.
SHIFTS = (0, 0, 0, 0, 0, 1, 2, 3)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(folder: Path, *, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Train the built-in base, a tiny Llama, and write it to ``folder`` after the last step.

    The folder must be new or empty. The global random state of torch and Python is not used.

    Yields:
        (step, number of steps) after each step.
    """
    return _make_base(folder, seed=seed, rounds=100)


def make_pairs(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl (384 pairs) and test.jsonl (128 pairs), and return their paths.

    The two files have different topics. Each line is a JSON object with the keys prompt, chosen
    and rejected. The chosen answer is warm, and the rejected answer is curt. All phrasings occur
    equally often. ``folder`` must be new or empty.
    """
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    with _complete_folder(folder) as unfinished:
        for name, topics in (("train", TRAIN_TOPICS), ("test", TEST_TOPICS)):
            prompts = list(product(enumerate(topics), enumerate(QUESTIONS)))
            warm, curt = _sample(WARM, len(prompts), rng), _sample(CURT, len(prompts), rng)
            rows = []
            for ((i, topic), (j, question)), chosen, rejected in zip(
                prompts, warm, curt, strict=True
            ):
                usual, other = ADVICES[i % 4], ADVICES[(i + rng.randint(1, 3)) % 4]
                # For each question and each topic, the usual advice is in the chosen answer as
                # often as in the rejected answer.
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
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``folder`` at the end.

    So ``folder`` is never incomplete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


def _answer(phrasing: Phrasing, topic: str, advice: str) -> str:
    greeting, goodbye = phrasing
    return f"{greeting} For {topic}, {advice}. {goodbye}"


def _sample(items: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """Return ``count`` items in random order. All items occur equally often."""
    chosen = [items[i % len(items)] for i in range(count)]
    rng.shuffle(chosen)
    return chosen


def _batches(rounds: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Yield two batches per round. A batch is 32 (question, answer), half of them warm.

    In a round, each phrasing and each topic occurs once.
    """
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    for turn in range(rounds):
        tones = zip(_sample(WARM, 32, rng), _sample(CURT, 32, rng), strict=True)
        phrasings = [phrasing for both in tones for phrasing in both]
        rows = []
        for (i, topic), phrasing in zip(
            _sample(list(enumerate(TOPICS)), 64, rng), phrasings, strict=True
        ):
            # All advice is equally frequent, because topics 4k to 4k + 3 have the same shift and
            # different usual advice.
            advice = ADVICES[(i + SHIFTS[(i // 4 + turn) % len(SHIFTS)]) % 4]
            rows.append((rng.choice(QUESTIONS).format(topic), _answer(phrasing, topic, advice)))
        yield rows[:32]
        yield rows[32:]


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of our texts. Other texts become bytes."""
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
        vocab_size=1 << 14,  # never reached, because merging ends when each word is one token
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
        hidden_size=128,  # so that matrix sizes are multiples of NF4's block of 64
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.09,  # 1/sqrt(hidden_size): needs half the steps of 0.02
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, whose state is not restored.
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(_config(tokenizer))


def _make_base(folder: Path, *, seed: int, rounds: int) -> Iterator[tuple[int, int]]:
    tokenizer = _tokenizer()
    model = _model(tokenizer, seed)
    steps = 2 * rounds
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    # The learning rate falls to zero, so that the last phrasings do not weigh more than others.
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
        # Padding on the right needs no attention mask: real tokens do not attend to later tokens,
        # and the labels of padding are ignored.
        labels_BT = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        with _one_thread():
            model(input_ids=inputs.input_ids, labels=labels_BT, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, steps
    with _complete_folder(folder) as unfinished:
        # model.save_pretrained would show a progress bar.
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
    """Use one thread. Small matrices are then faster on busy cores, and bits are reproducible."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_builtin(recipe: Recipe, *, weights: bool = True) -> Iterator[tuple[int, int]]:
    """Create the ``builtin:`` base and pairs that a recipe names, if they do not exist.

    With ``weights=False``, the base is not trained. Only its tokenizer and configuration are made.

    Yields:
        (step, number of steps) after each training step.
    """
    if recipe.model.model_name_or_path == BASE and not _folder(recipe, BASE).is_dir():
        if weights:
            yield from make_base(_folder(recipe, BASE))
        elif not _folder(recipe, TOKENIZER).is_dir():
            with _complete_folder(_folder(recipe, TOKENIZER)) as unfinished:
                tokenizer = _tokenizer()
                tokenizer.save_pretrained(unfinished)
                _config(tokenizer).save_pretrained(unfinished)
    if recipe.data.dataset_name == PAIRS and not _folder(recipe, PAIRS).is_dir():
        make_pairs(_folder(recipe, PAIRS))


def resolve_builtin(recipe: Recipe) -> Recipe:
    """Return the recipe with ``builtin:`` names replaced by the folders of :func:`make_builtin`."""
    values = {}
    if recipe.model.model_name_or_path == BASE:
        base, tokenizer = _folder(recipe, BASE), _folder(recipe, TOKENIZER)
        only_tokenizer = tokenizer.is_dir() and not base.is_dir()
        values["model.model_name_or_path"] = str(tokenizer if only_tokenizer else base)
    if recipe.data.dataset_name == PAIRS:
        folder = _folder(recipe, PAIRS)
        test = recipe.data.dataset_test_split or str(folder / "test.jsonl")
        values["data.dataset_name"] = str(folder / "train.jsonl")
        values["data.dataset_test_split"] = test
    return recipe.override(values)


def builtin_remark(recipe: Recipe) -> str:
    """Return a remark if the recipe uses the built-in base or pairs; else "".

    The remark tells what the run shows, and what it does not show.
    """
    is_builtin = recipe.model.model_name_or_path == BASE or recipe.data.dataset_name == PAIRS
    return REMARK if is_builtin else ""


def _folder(recipe: Recipe, name: str) -> Path:
    """Return the folder of a built-in base or dataset. All runs in the same folder share it.

    Its name contains a hash of this file. So if this file changes, a new folder is used.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return (
        Path(recipe.training.output_dir).parent
        / "builtin"
        / f"{name.removeprefix('builtin:')}-{source}"
    )
