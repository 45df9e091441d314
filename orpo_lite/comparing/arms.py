"""Define the arms of a comparison: the objectives, and how a recipe is changed for each of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from orpo_lite.errors import Overrides, RecipeError
from orpo_lite.recipe.checks import LOSSES_WITH
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe

SFT, REWARD, JUDGE = "sft", "reward", "judge"
REWARD_KEY = "loss.reward_adapter_name_or_path"
OWN_REWARD = "the comparison's own"
"""Value of :data:`REWARD_KEY` for the reward model that the comparison trains on the arms' data."""
RATE = "training.learning_rate"


@dataclass(frozen=True)
class Arm:
    """An objective to compare, and the settings in which it differs from the recipe."""

    name: str
    loss: str
    """The value of ``loss.type``."""
    after_sft: bool = False
    """True: the training starts from the adapter of the arm sft with the same seed."""
    one_epoch: bool = False
    """True: the training has at most one epoch, as SFT has in the paper."""
    rate: float = 1.0
    """Factor of the recipe's learning rate. A loss without an NLL term needs a lower rate."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """``loss.KEY`` -> the value that suits this loss."""


# An objective that is added to loss.type needs one line here to become an arm.
ARMS = {
    arm.name: arm
    for arm in (
        Arm(SFT, "sft", one_epoch=True),
        Arm("sft-equal-epochs", "sft"),
        Arm("orpo", "orpo", settings={"loss.beta": 0.1}),
        Arm("dpo", "dpo", after_sft=True, rate=0.1, settings={"loss.beta": 0.1}),
        # β and γ of the SimPO paper for Llama-3-Base (arXiv 2405.14734, Table 7).
        Arm(
            "simpo",
            "simpo",
            after_sft=True,
            rate=0.1,
            settings={"loss.beta": 2.0, "loss.simpo_gamma": 1.0},
        ),
        Arm("cpo", "cpo", rate=0.1, settings={"loss.beta": 0.1}),
        Arm("ppo", "ppo", after_sft=True, rate=0.1, settings={REWARD_KEY: OWN_REWARD}),
    )
}
DEFAULT_ARMS = ("sft", "orpo", "dpo", "simpo")
JUDGE_ARM, REWARD_ARM = Arm(JUDGE, "reward"), Arm(REWARD, "reward")

# The keys that are the same in all arms, because the comparison sets them or needs them equal.
SHARED = ("model.model_name_or_path", "model.model_revision", "training.seed")
SHARED_TOO = ("training.output_dir", "loss.type", "model.adapter_name_or_path")
# The judge only reads the texts of the arms, so it may have another base.
JUDGE_BASE = ("model.model_name_or_path", "model.model_revision")
OF_EVERY_LOSS = ("loss.completion_only_loss", "loss.nll_reduction")


def choose_arms(text: str) -> list[Arm]:
    """Return the arms that a text such as ``"sft,orpo"`` names.

    Raises:
        RecipeError: a name is unknown or repeated, there are fewer than two names, or this version
            of orpo-lite cannot train the arm.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    losses = get_args(LossSection.model_fields["type"].annotation)
    known = [name for name, arm in ARMS.items() if arm.loss in losses]
    for name in names:
        if name not in known:
            found = f"{name!r} is not an arm"
            if name in ARMS:
                found = f"this version cannot train {name}: loss.type has no value {name}"
            raise RecipeError(
                where=f"--arms {text}",
                found=found,
                expected=f"names of {', '.join(known)}, separated by commas",
                fix=f"--arms {','.join(other for other in names if other in known) or 'sft,orpo'}",
            )
    unique = [*dict.fromkeys(names)]
    if len(unique) < 2 or len(unique) < len(names):
        raise RecipeError(
            where=f"--arms {text}",
            found="names an arm twice" if len(unique) < len(names) else "names fewer than two arms",
            expected="two or more different arms",
            fix=f"--arms {','.join(unique if len(unique) > 1 else ['sft', 'orpo'])}",
        )
    return [ARMS[name] for name in unique]


@dataclass(frozen=True)
class Words:
    """The ``KEY=VALUE`` words of a command line: those for all arms, and those for one arm."""

    common: Sequence[str]
    of_arm: Mapping[str, Sequence[str]]
    """Name of an arm, or judge -> its words, without the name."""


def read_words(words: Sequence[str], arms: Sequence[Arm]) -> Words:
    """Divide words such as ``training.max_steps=9`` and ``dpo:loss.beta=0.2`` by arm.

    Raises:
        RecipeError: a word is for an arm that is not compared, sets a key for one arm that must be
            the same in all arms, or sets a key of one loss for all arms.
    """
    names = [arm.name for arm in _with_start(arms)] + [JUDGE]
    common: list[str] = []
    of_arm: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        arm, colon, inner = key.partition(":")
        if not (equals and colon):
            _refuse_of_one_loss(key.strip(), value, names)
            common.append(word)
            continue
        arm, inner = arm.strip(), inner.strip()
        if arm not in names:
            raise RecipeError(
                where=f"argument {word!r}",
                found=f"{arm} is not an arm of this comparison",
                expected=f"one of {', '.join(names)} before the colon",
                fix=f"{inner}={value} sets the key in all arms",
            )
        is_shared = inner in (*SHARED, *SHARED_TOO) or inner.startswith("data.")
        if is_shared and not (arm == JUDGE and inner in JUDGE_BASE):
            raise RecipeError(
                where=f"argument {word!r}",
                found=f"sets {inner} only for {arm}",
                expected="a key that may differ between arms",
                fix="leave the word out"
                if inner in SHARED_TOO
                else Overrides({inner: value}, " sets it for all arms"),
            )
        of_arm.setdefault(arm, []).append(f"{inner}={value}")
    return Words(common, of_arm)


def _refuse_of_one_loss(key: str, value: str, names: Sequence[str]) -> None:
    """Raise RecipeError for a key of the section loss that does not mean the same in all losses."""
    if not key.startswith("loss.") or key in OF_EVERY_LOSS:
        return
    types = LOSSES_WITH.get(key.removeprefix("loss."), ())
    arm = next((name for name in names if name in (types or ("orpo",))), names[0])
    is_type = key == "loss.type"
    raise RecipeError(
        where=f"argument '{key}={value}'",
        found="--arms chooses the losses" if is_type else "this key differs between losses",
        expected="--arms" if is_type else "the name of an arm before the key",
        fix=f"--arms {value}" if is_type else f"{arm}:{key}={value}",
    )


def _with_start(arms: Sequence[Arm]) -> Iterator[Arm]:
    """Yield the arms to train, first those that other arms start from."""
    if any(arm.after_sft for arm in arms) or ARMS[SFT] in arms:
        yield ARMS[SFT]
    if any(REWARD_KEY in arm.settings for arm in arms):
        yield REWARD_ARM
    yield from (arm for arm in arms if arm.name != SFT)


def trained_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms to train. An arm comes after those whose adapters it reads."""
    return [*_with_start(arms)]


def arm_recipe(name: str, words: Words, arm: Arm, seed: int) -> Recipe:
    """Return the recipe of an arm, without the data and the folders of the comparison.

    A key of the section loss has the recipe's value if the recipe is for this loss, else the arm's
    own value, else the default. A word of the command line is stronger.

    Args:
        name: the name or path of the recipe.
        words: the words of the command line.
        arm: the arm.
        seed: the seed of the training.

    Raises:
        RecipeError: the recipe or a word is wrong.
    """
    base = load_recipe(name, words.common)
    own = [f"loss.type={arm.loss}", f"training.seed={seed}"]
    if base.loss.type != arm.loss:
        keys = [f"loss.{key}" for key in ("beta", *LOSSES_WITH)]
        values = dict(base.items())
        own += [
            _word(key, arm.settings.get(key, _default(key)))
            for key in keys
            if key in arm.settings or values[key] != _default(key)
        ]
    if arm.rate != 1.0 and base.sources[RATE] != "command line":
        own.append(f"{RATE}={base.training.learning_rate * arm.rate:.6g}")
    if arm.one_epoch:
        own.append(f"training.num_train_epochs={min(1.0, base.training.num_train_epochs):g}")
    if arm.loss == "reward":
        own.append("model.adapter_name_or_path=null")
    return load_recipe(name, [*words.common, *own, *words.of_arm.get(arm.name, ())])


def _default(key: str) -> Any:
    return LossSection.model_fields[key.removeprefix("loss.")].default


def _word(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else value}"
