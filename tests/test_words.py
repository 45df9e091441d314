"""Words that the project once had of its own, and that an engineer of the field has to look up."""

import re

import pytest
from conftest import ROOT

FILES = [
    *ROOT.glob("orpo_lite/**/*.py"),
    *ROOT.glob("recipes/*.yaml"),
    *ROOT.glob("docs/*.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
# Each with the word to write instead.
PRIVATE = {
    r"(?<!\")levers?\b(?!\")": "memory setting (the keys of plan.json keep their names)",
    r"\bstands?\b(?!-in)": "is, appears",
    r"\bbeside\b": "next to",
    r"\bmend(s|ed|ing)?\b": "fix, correct",
    r"\bof no account\b": "irrelevant",
    r"\b(told|tells?) apart\b": "distinguish",
    r"\b(is|are|was) said\b": "is reported",
    r"\bproof\b|\bproven\b": "probe, compare, shown",
    r"\bscoreless\b": "meta_flash_attention",
    r"\bgraphics cards?\b|\bcards? (with|of) \d": "GPU",
    r"\bwhoever\b|\bby itself\b": "a person, a caller; alone, automatically",
}


@pytest.mark.parametrize("word", PRIVATE)
def test_a_private_word_is_not_used(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(word, line, re.IGNORECASE)
    ]
    assert not found, f"write {PRIVATE[word]}:\n" + "\n".join(found)
