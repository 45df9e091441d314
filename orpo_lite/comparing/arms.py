"""Define the arms of a comparison: the objectives, and how a recipe is changed for each of them."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, get_args

from orpo_lite.errors import OrpoLiteError, Overrides, RecipeError, reworded
from orpo_lite.recipe.checks import LOSSES_WITH, LOSSES_WITHOUT
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import SECTIONS, Recipe

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
# The judge only reads the texts of the arms, so it may have another base, and limits of its own.
JUDGE_OWN = (
    "model.model_name_or_path",
    "model.model_revision",
    "data.max_length",
    "data.max_prompt_length",
)
OF_EVERY_LOSS = ("loss.completion_only_loss", "loss.nll_reduction")
LEAVE_OUT = "leave the word out"
OVERRIDE = re.compile(rf"(?<![\w.:])((?:{'|'.join(SECTIONS)})\.\w+)(?==)")
"""Matches ``section.key`` before an equals sign, unless the name of an arm is before it."""


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
    defaults: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name of an arm, or judge -> words that hold if no word of the arm sets the same key."""

    def sets(self, arm: str, key: str) -> bool:
        """Return True if a word that is only for this arm sets the key."""
        return any(word.partition("=")[0] == key for word in self.of_arm.get(arm, ()))


def read_words(words: Sequence[str], arms: Sequence[Arm]) -> Words:
    """Divide words such as ``training.max_steps=9`` and ``dpo:loss.beta=0.2`` by arm.

    Raises:
        RecipeError: a word has no value, is for an arm that is not compared, sets a key for one arm
            that must be the same in all arms or has no effect on this arm, or sets a key of one
            loss for all arms.
    """
    trained = [*_with_start(arms), JUDGE_ARM]
    names = [arm.name for arm in trained]
    common: list[str] = []
    of_arm: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        arm, colon, inner = key.partition(":")
        if not equals:
            is_key = key.rpartition(":")[2].partition(".")[0] in SECTIONS
            raise RecipeError(
                where=f"argument {word!r}",
                found="has no value",
                expected="KEY=VALUE or ARM:KEY=VALUE",
                fix=f"{word}=VALUE" if is_key else "leave the word out",
            )
        if not colon:
            _refuse_of_one_loss(key.strip(), value, trained)
            common.append(word)
            continue
        arm, inner = arm.strip(), inner.strip()
        if arm not in names:
            raise RecipeError(
                where=f"argument {word!r}",
                found=f"{arm} is not an arm of this comparison",
                expected=f"one of {', '.join(names)} before the colon",
                fix=_other_arm(arm, inner, value, arms, trained),
            )
        if not may_differ(inner, arm):
            raise RecipeError(
                where=f"argument {word!r}",
                found=f"sets {inner} only for {arm}",
                expected="a key that may differ between arms",
                fix=LEAVE_OUT
                if inner in SHARED_TOO
                else Overrides({inner: value}, " sets it for all arms"),
            )
        loss = next(one.loss for one in trained if one.name == arm)
        if not uses(loss, inner):
            raise RecipeError(
                where=f"argument {word!r}",
                found=f"{inner} has no effect on loss.type {loss}",
                expected="a key that the loss of the arm uses",
                fix=_word_of_loss(inner, value, trained) or LEAVE_OUT,
            )
        of_arm.setdefault(arm, []).append(f"{inner}={value}")
    return Words(common, of_arm)


def may_differ(key: str, arm: str) -> bool:
    """Return True if the key may have a value of its own in an arm or in the judge."""
    if arm == JUDGE and key in JUDGE_OWN:
        return True
    return key not in (*SHARED, *SHARED_TOO) and not key.startswith("data.")


def uses(loss: str, key: str) -> bool:
    """Return False if ``section.key`` is a key of the section loss that this loss does not use."""
    section, _, name = key.partition(".")
    if section != "loss":
        return True
    if name in LOSSES_WITH:
        return loss in LOSSES_WITH[name]
    return loss not in LOSSES_WITHOUT.get(name, ())


def _is_of_one_loss(key: str) -> bool:
    """Return True for a key of the section loss that does not mean the same in all losses."""
    section, _, name = key.partition(".")
    return section == "loss" and name in LossSection.model_fields and key not in OF_EVERY_LOSS


def _refuse_of_one_loss(key: str, value: str, trained: Sequence[Arm]) -> None:
    """Raise RecipeError for a key of the section loss that does not mean the same in all losses."""
    if not _is_of_one_loss(key):
        return
    if key == "loss.type":
        found, expected, fix = "--arms chooses the losses", "--arms", f"--arms {value}"
    elif word := _word_of_loss(key, value, trained):
        found = "this key differs between losses"
        expected, fix = "the name of an arm before the key", word
    else:
        found, fix = "no arm of this comparison uses this key", LEAVE_OUT
        expected = "a key that the loss of an arm uses"
    raise RecipeError(where=f"argument '{key}={value}'", found=found, expected=expected, fix=fix)


def _word_of_loss(key: str, value: str, trained: Sequence[Arm]) -> str:
    """Return the word that sets a key in the first arm whose loss uses it; "" if none does."""
    arm = next((arm.name for arm in trained if uses(arm.loss, key)), "")
    return f"{arm}:{key}={value}" if arm else ""


def _other_arm(arm: str, key: str, value: str, arms: Sequence[Arm], trained: Sequence[Arm]) -> str:
    """Return the fix for a word whose arm is not one of the trained arms."""
    missing = "ppo" if arm == REWARD else arm
    if missing in ARMS:
        return f"--arms {','.join([*(one.name for one in arms), missing])}, or {LEAVE_OUT}"
    for near in get_close_matches(arm, [one.name for one in trained]):
        loss = next(one.loss for one in trained if one.name == near)
        if may_differ(key, near) and uses(loss, key):
            return f"{near}:{key}={value}"
    if _is_of_one_loss(key):
        return ("" if key == "loss.type" else _word_of_loss(key, value, trained)) or LEAVE_OUT
    return f"{key}={value} sets the key in all arms"


def name_arm(
    error: OrpoLiteError, label: str, arm: str, keys: Collection[str] | None = None
) -> None:
    """Name an arm in an error of its recipe or its training: the place, and the keys of the fix.

    A key that must be the same in all arms stays without the name.

    Args:
        error: the error, which is changed.
        label: the name for the place, such as dpo or dpo-seed42.
        arm: the name of the arm, or judge.
        keys: the keys that get the name in the fix. None: all that may differ between arms.
    """

    def with_name(found: re.Match[str]) -> str:
        key = found[0]
        is_own = may_differ(key, arm) and (keys is None or key in keys or _is_of_one_loss(key))
        return f"{arm}:{key}" if is_own else key

    if not error.where:  # one error that lists several
        error.found = OVERRIDE.sub(with_name, error.found)
    error.where = f"{label}: {error.where}" if error.where else label
    error.fix = reworded(error.fix, OVERRIDE.sub(with_name, error.fix))


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
    own value, else the default. A default of ``words`` is stronger, and a word of the command line
    is stronger still.

    Args:
        name: the name or path of the recipe.
        words: the words of the command line.
        arm: the arm.
        seed: the seed of the training.

    Raises:
        RecipeError: the recipe or a word is wrong. An error of this arm alone names the arm.
    """
    base = load_recipe(name, words.common)
    own = [f"loss.type={arm.loss}", f"training.seed={seed}"]
    if base.loss.type != arm.loss:
        unused = (key for key, losses in LOSSES_WITHOUT.items() if arm.loss in losses)
        keys = [f"loss.{key}" for key in dict.fromkeys(("beta", *unused, *LOSSES_WITH))]
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
    own += [*words.defaults.get(arm.name, ()), *words.of_arm.get(arm.name, ())]
    try:
        return load_recipe(name, [*words.common, *own])
    except RecipeError as error:
        name_arm(error, arm.name, arm.name)
        raise


def _default(key: str) -> Any:
    return LossSection.model_fields[key.removeprefix("loss.")].default


def _word(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else value}"
