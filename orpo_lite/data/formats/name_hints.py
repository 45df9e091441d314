"""What the name of a column says. Only ever a suggestion in an error message: by these words alone none is taken."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from orpo_lite.data.formats.columns import ALIASES, MANY, NUMBERED, ColumnProfile, plain_name, shown, words
from orpo_lite.data.formats.values import CHAT, SCALARS, TEXTS, USABLE, waits_for_reply

FEW = 10  # rows: less say nothing of what a column repeats
POLAR = {
    "chosen": frozenset("chosen accepted accept preferred winner winning win good better best positive w".split()),
    "rejected": frozenset("rejected reject dispreferred loser losing lose bad worse worst negative l".split()),
}
VERDICT = frozenset("better best winner winning preferred preference choice chosen vote verdict label labels".split())
PROMPT = frozenset("prompt question instruction query problem task".split())
DENYING = frozenset("non not".split())
DOUBTFUL = DENYING | frozenset(
    "un dis no never nor without anti less least than second third next almost former previous original old".split()
)
MEASURING = frozenset(
    "score scores rating ratings rank ranks ranking reward rewards correct grade grades strength margin count".split()
)
NOT_A_REPLY = MEASURING | PROMPT | frozenset("model id source reason rationale feedback name system label".split())
ABOUT = NOT_A_REPLY - PROMPT | POLAR["chosen"] | POLAR["rejected"]  # of a reply or of the set: no prompt


def names_better(column: str) -> bool:
    """The value is the name of the better answer. Not so of loser, nor of best_0, which speaks of one answer alone."""
    said = set(words(column))
    denied = said & (POLAR["rejected"] | DOUBTFUL | MEASURING)
    return bool(said & VERDICT) and not denied and not NUMBERED.fullmatch(column)


def side_of(column: str) -> str | None:
    """chosen or rejected, where the name says so beyond doubt: not of less_preferred, nor of worse_than_best."""
    said = words(column)
    sides = [side for side, polar in POLAR.items() if polar & set(said)]
    if len(sides) != 1 or NOT_A_REPLY & set(said):
        return None
    doubts = [word for word in said if word in DOUBTFUL]
    if not doubts:
        return sides[0]
    denied = any(word in DENYING and after in POLAR["chosen"] for word, after in pairwise(said))
    return "rejected" if denied and len(doubts) == 1 else None


def hint(profile: ColumnProfile, side: str) -> str | None:
    named = [column for column in profile.columns if profile.kind(column) in USABLE]
    own = [column for column in named if plain_name(column) == side]
    hints = own or [column for column in named if side_of(column) == side and not _holds_labels(profile, column)]
    return hints[0] if len(hints) == 1 else None


def prompt_hint(profile: ColumnProfile, replies: Sequence[str]) -> str | None:
    texts = [column for column in profile.columns if profile.kind(column) in (*TEXTS, *CHAT) and column not in replies]
    texts = [column for column in texts if not ABOUT & set(words(column)) and not _holds_labels(profile, column)]
    by_word = [column for column in texts if PROMPT & set(words(column))]
    known = [column for column in profile.candidates("prompt") if column in texts]
    asking = [
        column for column in texts if profile.kind(column) in CHAT and profile.share(waits_for_reply, column) > 0.5
    ]
    single = [column for column in texts if profile.kind(column) in TEXTS and could_ask(profile, column)]
    for hints in (known[:1], asking, by_word, like_prompts(profile), single):
        if len(hints) == 1 and hints[0] not in replies:
            return hints[0]
    return None


def _holds_labels(profile: ColumnProfile, column: str) -> bool:
    """Single words that name other columns, or the same few again and again: a verdict or a topic, no text to learn."""
    texts = [text.strip().lower() for (text,) in profile.values(column)] if profile.kind(column) in TEXTS else []
    names = {plain_name(other) for other in profile.columns} | {"model_a", "model_b", "tie"}
    single = bool(texts) and all(len(text.split()) == 1 for text in texts)
    return single and (set(texts) <= names or (len(texts) >= FEW and len(set(texts)) <= len(texts) / 2))


def like_prompts(profile: ColumnProfile) -> list[str]:
    """Columns that could well hold the prompt under another name: mostly distinct texts of several words."""
    return [column for column in profile.columns if _says_much(profile, column, lambda text: len(text.split()) > 1)]


def could_ask(profile: ColumnProfile, column: str) -> bool:
    """It may hold the prompt, of any kind and under any name: what must not be lost where no prompt was found."""
    if plain_name(column) == "prompt" or profile.kind(column) in TEXTS:
        named = plain_name(column) == "prompt" and profile.kind(column) != "null"
        return named or _says_much(profile, column, lambda text: len(text.split()) > 1 or text.strip().isalpha())
    return profile.kind(column) not in (*SCALARS, "numbers") and not ABOUT & set(words(column))


def _says_much(profile: ColumnProfile, column: str, says: Callable[[str], bool]) -> bool:
    texts = [text for (text,) in profile.values(column)] if profile.kind(column) in TEXTS else []
    many = sum(map(says, texts)) >= MANY * len(texts) > 0
    return many and len(set(texts)) > len(texts) / 2 and not ABOUT & set(words(column))


def single_reply(profile: ColumnProfile) -> str:
    """A sentence for the sets that have only one reply to each prompt, and are often taken for pairs."""

    def first(names: Iterable[str], *kinds: str) -> str | None:
        return next((column for column in profile.named(*names) if not kinds or profile.kind(column) in kinds), None)

    reply = first(("completion", "response", "output", "answer"), *USABLE)
    prompt = next((column for column in profile.candidates("prompt") if column != reply), None)
    label = first(("label", "labels", "kto_tag"))
    chat = first(ALIASES["conversation"], *CHAT)
    if reply and prompt and label:
        return f"{shown(prompt, reply, label)} are unpaired preferences, one reply with a label, as for KTO"
    if reply and prompt:
        return f"{shown(prompt, reply)} are one reply to each prompt, as for supervised fine-tuning"
    if chat and label and profile.kind("chosen") == "missing":
        return f"{shown(chat, label)} are unpaired preferences, one conversation with a label, as for KTO"
    if chat and profile.kind("chosen") == "missing":
        return f"{shown(chat)} holds one conversation a row, as for supervised fine-tuning"
    return ""
