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
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_lite.recipe import Recipe

BASE = "builtin:tiny-llama"
PAIRS = "builtin:two-tones"
REMARK = (
    "This run used the built-in toy base and its two-tone pairs: it shows that the machinery works on this machine, "
    "not how good a model it makes. For that, choose a real base and real preferences."
)

Phrasing = tuple[str, str]  # greeting, goodbye

# Greetings are five tokens each, goodbyes six, whatever the tone: a comma, a full stop and a word count alike. Some
# first words serve both tones, so that no single token decides between them.
WARM: list[Phrasing] = list(
    product(
        (
            "What a lovely question!",
            "So glad you asked!",
            "Oh, wonderful idea!",
            "Happy to help you!",
            "That sounds like fun!",
            "Great that you ask!",
            "You picked something nice!",
            "I love this topic!",
        ),
        (
            "You will do really well!",
            "Enjoy every minute of it!",
            "I am cheering for you!",
            "Tell me how it goes!",
        ),
    )
)
CURT: list[Phrasing] = list(
    product(
        (
            "What, this again?",
            "So you want help.",
            "Fine, just once.",
            "Must I really answer?",
            "That is rather obvious.",
            "Everyone knows that already.",
            "You could look yourself.",
            "I have no time.",
        ),
        (
            "You will manage without me.",
            "That is all from me.",
            "I will not repeat this.",
            "Please do not ask again.",
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
TOPICS = [topic for row in zip(*ADVICE.values(), strict=True) for topic in row]  # the usual advice of i is i % 4
TRAIN_TOPICS, TEST_TOPICS = TOPICS[:48], TOPICS[48:]
SHIFTS = (0, 0, 0, 0, 0, 1, 2, 3)  # the base hears the usual advice five times in eight, each other one once

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(folder: Path, *, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Train the tiny Llama and write it to ``folder``, which must not exist yet, once the last step is done.

    Yields:
        (step, steps), after each step. The caller's random state is neither read nor changed.
    """
    return _make_base(folder, seed=seed, steps=120)


def make_pairs(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl (384 pairs) and test.jsonl (128 pairs on other topics), chosen warm and rejected curt."""
    rng = random.Random(seed)  # noqa: S311 - chance, not secrets
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, topics in zip(paths, (TRAIN_TOPICS, TEST_TOPICS), strict=True):
        prompts = list(product(enumerate(topics), enumerate(QUESTIONS)))
        warm, curt = _deal(WARM, len(prompts), rng), _deal(CURT, len(prompts), rng)
        rows = []
        for ((i, topic), (j, question)), chosen, rejected in zip(prompts, warm, curt, strict=True):
            advices = [ADVICES[i % 4], ADVICES[(i + rng.randint(1, 3)) % 4]]
            if (i // 4 + j) % 2:  # the usual advice is as often the rejected one, for each topic and each question
                advices.reverse()
            rows.append(
                {
                    "prompt": question.format(topic),
                    "chosen": _answer(chosen, topic, advices[0]),
                    "rejected": _answer(rejected, topic, advices[1]),
                }
            )
        rng.shuffle(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def _answer(phrasing: Phrasing, topic: str, advice: str) -> str:
    greeting, goodbye = phrasing
    return f"{greeting} For {topic}, {advice}. {goodbye}"


def _deal(cards: Sequence[Phrasing], hands: int, rng: random.Random) -> list[Phrasing]:
    """``hands`` shuffled cards, each card equally often."""
    dealt = [cards[i % len(cards)] for i in range(hands)]
    rng.shuffle(dealt)
    return dealt


def _batches(steps: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """``steps`` batches of 64 (question, answer), in each of which every phrasing and every topic stands once."""
    rng = random.Random(seed)  # noqa: S311 - chance, not secrets
    for step in range(steps):
        phrasings = _deal(WARM + CURT, len(TOPICS), rng)
        # Four topics in a row share a shift and differ in their usual advice: no advice is the commoner one.
        shifts = [SHIFTS[(i // 4 + step) % len(SHIFTS)] for i in range(len(TOPICS))]
        yield [
            (rng.choice(QUESTIONS).format(topic), _answer(phrasing, topic, ADVICES[(i + shift) % 4]))
            for i, (topic, phrasing, shift) in enumerate(zip(TOPICS, phrasings, shifts, strict=True))
        ]


def _tokenizer() -> PreTrainedTokenizerFast:
    """Each word of ours is one token; any other text falls back to bytes, so nothing is ever unknown."""
    texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    texts += [_answer(phrasing, topic, advice) for phrasing, topic, advice in product(WARM + CURT, TOPICS[:1], ADVICES)]
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


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # every matrix is a multiple of NF4's block of 64
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,  # about 1/sqrt(hidden_size): learns in half the steps of 0.02
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs, which are not forked
        return LlamaForCausalLM(config)


def _make_base(folder: Path, *, seed: int, steps: int) -> Iterator[tuple[int, int]]:
    tokenizer = _tokenizer()
    model = _model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # Up fast, then down to zero: the last steps average out which phrasing happened to come last.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(_batches(steps, seed), start=1):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for question, answer in batch
        ]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        model(input_ids=inputs.input_ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, steps
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)  # a folder that is there is whole


def make_builtin(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Make the ``builtin:`` base and pairs that a recipe names, unless they are there; yields (step, steps)."""
    if recipe.model.model_name_or_path == BASE and not _folder(recipe, BASE).is_dir():
        yield from make_base(_folder(recipe, BASE))
    if recipe.data.dataset_name == PAIRS and not _folder(recipe, PAIRS).is_dir():
        make_pairs(_folder(recipe, PAIRS))


def resolve_builtin(recipe: Recipe) -> Recipe:
    """The recipe with the folders of :func:`make_builtin` in place of the ``builtin:`` names."""
    values = {}
    if recipe.model.model_name_or_path == BASE:
        values["model.model_name_or_path"] = str(_folder(recipe, BASE))
    if recipe.data.dataset_name == PAIRS:
        values["data.dataset_name"] = str(_folder(recipe, PAIRS) / "train.jsonl")
        values["data.dataset_test_split"] = str(_folder(recipe, PAIRS) / "test.jsonl")
    return recipe.override(values)


def builtin_remark(recipe: Recipe) -> str:
    """What to say at the end of a run on built-in parts; "" for any other."""
    return REMARK if BASE == recipe.model.model_name_or_path or PAIRS == recipe.data.dataset_name else ""


def _folder(recipe: Recipe, name: str) -> Path:
    """Beside the run folder, shared by its siblings; the name changes with this file, so nothing stale is read."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return Path(recipe.training.output_dir).parent / "builtin" / f"{name.removeprefix('builtin:')}-{source}"
