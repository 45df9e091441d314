"""What the name of a column says: what we call it, which reply it holds, whether it measures or judges."""

import re
from itertools import pairwise

from orpo_lite.data.pair import COLUMNS

SIDES = ("chosen", "rejected")
OPENAI = ("input", "preferred_output", "non_preferred_output")  # the columns of OpenAI's own format

# What other sets call a column of ours. For chosen and rejected, see ``side_of``.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "problem", "user_prompt", "user_input", "history",
               "context"),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt"),
    "conversation": ("conversation", "conversations", "messages", "context"),
    "history": ("history",),
    "input": ("input",),
    "completions": ("completions", "answers", "responses", "generations", "candidates"),
    "scores": ("scores", "score", "ratings", "rating", "rewards", "reward"),
    "ranks": ("ranks", "rank", "rankings", "ranking"),
}  # fmt: skip
KNOWN = {*COLUMNS, *OPENAI, "output", *(alias for aliases in ALIASES.values() for alias in aliases)}
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
REPLY = frozenset(
    "response responses answer answers output outputs completion completions text reply replies message messages "
    "generation conversation conversations candidate content summary y".split()
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


def is_reply(column: str) -> bool:
    """Whether the name says that it is a reply, and nothing else: of chosen_response, not of chosen_critique."""
    said = set(words(column))
    return bool(said & REPLY) and said <= REPLY | DENYING | POLAR["chosen"] | POLAR["rejected"]


def is_answer(column: str) -> bool:
    """Whether by its name it is one of several answers."""
    match = NUMBERED.fullmatch(column)
    return match is not None and any(word in match[1].lower() for word in ANSWER_WORDS)


ANSWER_WORDS = ("response", "answer", "completion", "output", "reply", "generation", "conv", "messages", "human_ref")
NUMBERED = re.compile(r"(.*?)[ _-]?([012ab])", re.IGNORECASE)  # response_0, response1, human_ref_A


def plain_name(column: str) -> str:
    """system_prompt, of System Prompt, system-prompt and systemPrompt."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())
    return re.sub(r"[\s_-]+", "_", parted).lower()


def words(column: str) -> list[str]:
    """The words of a column's name: good, answer of good_answer2 and of GoodAnswer."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", column)]


def shown(*columns: str) -> str:
    """Their names in a sentence, without what a terminal would act on."""
    *names, last = [column if column.isprintable() else repr(column) for column in columns] or [""]
    return f"{', '.join(names)} and {last}" if names else last
