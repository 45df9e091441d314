"""Interpret column names: which columns are prompts, replies, scores or verdicts."""

import re
from itertools import pairwise

from orpo_lite.data.pair import COLUMNS

REPLIES = ("chosen", "rejected")
OPENAI = ("input", "preferred_output", "non_preferred_output")  # the columns of OpenAI's own format

# Standard name -> names that datasets use for it. For chosen and rejected, see ``reply_named_by``.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "problem", "user_prompt",
               "user_input", "history", "context"),
    "system": ("system", "system_prompt", "system_message", "system_instruction",
               "system_instructions", "sys_prompt"),
    "conversation": ("conversation", "conversations", "messages", "context"),
    "history": ("history",),
    "input": ("input",),
    "completions": ("completions", "answers", "responses", "generations", "candidates"),
    "scores": ("scores", "score", "ratings", "rating", "rewards", "reward"),
    "ranks": ("ranks", "rank", "rankings", "ranking"),
}  # fmt: skip
KNOWN = {*COLUMNS, *OPENAI, "output", *(alias for aliases in ALIASES.values() for alias in aliases)}

# Words in column names.
SIDE_WORDS = {
    "chosen": frozenset(
        "chosen accepted accept preferred winner winning win good better best positive w".split()
    ),
    "rejected": frozenset(
        "rejected reject dispreferred loser losing lose bad worse worst negative l".split()
    ),
}
VERDICT_WORDS = frozenset(
    "better best winner winning preferred preference choice chosen vote verdict label "
    "labels".split()
)
PROMPT_WORDS = frozenset("prompt question instruction query problem task".split())
NEGATIONS = frozenset("non not".split())
DOUBT_WORDS = NEGATIONS | frozenset(
    "un dis no never nor without anti less least than second third next almost former previous "
    "original old".split()
)
REPLY_WORDS = frozenset(
    "response responses answer answers output outputs completion completions text reply replies "
    "message messages generation conversation conversations candidate content summary y".split()
)
SCORE_WORDS = frozenset(
    "score scores rating ratings rank ranks ranking reward rewards correct grade grades strength "
    "margin count".split()
)
NOT_REPLY_WORDS = (
    SCORE_WORDS
    | PROMPT_WORDS
    | frozenset("model id source reason rationale feedback name system label".split())
)
# Words that show that a column is not the prompt.
NOT_PROMPT_WORDS = NOT_REPLY_WORDS - PROMPT_WORDS | SIDE_WORDS["chosen"] | SIDE_WORDS["rejected"]

ANSWER_WORDS = ("response", "answer", "completion", "output", "reply", "generation", "conv",
                "messages", "human_ref")  # fmt: skip
NUMBERED = re.compile(r"(.*?)[ _-]?([012ab])", re.IGNORECASE)  # response_0, response1, human_ref_A


def names_better(column: str) -> bool:
    """Return whether a column seems to name the better answer of each row.

    Only the column's name is examined. ``winner`` -> True. ``loser`` -> False: the column names the
    worse answer. ``best_0`` -> False: the column is about one answer.
    """
    found = set(words(column))
    denied = found & (SIDE_WORDS["rejected"] | DOUBT_WORDS | SCORE_WORDS)
    return bool(found & VERDICT_WORDS) and not denied and not NUMBERED.fullmatch(column)


def reply_named_by(column: str) -> str | None:
    """Return chosen or rejected if a column's name clearly means one of them, else None.

    ``good_answer`` -> ``chosen``, ``not_preferred`` -> ``rejected``, ``less_preferred`` -> None.
    """
    found = words(column)
    named = [reply for reply, side_words in SIDE_WORDS.items() if side_words & set(found)]
    if len(named) != 1 or NOT_REPLY_WORDS & set(found):
        return None
    doubts = [word for word in found if word in DOUBT_WORDS]
    if not doubts:
        return named[0]
    is_negated = any(
        word in NEGATIONS and after in SIDE_WORDS["chosen"] for word, after in pairwise(found)
    )
    return "rejected" if is_negated and len(doubts) == 1 else None


def is_reply(column: str) -> bool:
    """Return whether a column with this name should hold replies.

    ``chosen_response`` -> True, ``chosen_critique`` -> False.
    """
    found = set(words(column))
    allowed = REPLY_WORDS | NEGATIONS | SIDE_WORDS["chosen"] | SIDE_WORDS["rejected"]
    return bool(found & REPLY_WORDS) and found <= allowed


def is_answer(column: str) -> bool:
    """Return whether a column's name is the name of a numbered answer: ``response_1`` -> True.

    Such a name contains a word such as response, and ends with 0, 1, 2, a or b.
    """
    match = NUMBERED.fullmatch(column)
    return match is not None and any(word in match[1].lower() for word in ANSWER_WORDS)


def plain_name(column: str) -> str:
    """Return a name in snake case: ``System Prompt`` or ``systemPrompt`` -> ``system_prompt``."""
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())
    return re.sub(r"[\s_-]+", "_", separated).lower()


def words(column: str) -> list[str]:
    """Return a name's words: ``good_answer2`` or ``GoodAnswer`` -> ``["good", "answer"]``."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", column)]


def join_names(*columns: str) -> str:
    """Join names for a sentence: "a, b and c". A name with control characters is escaped."""
    names = [column if column.isprintable() else repr(column) for column in columns]
    if not names:
        return ""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
