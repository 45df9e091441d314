"""Convert a tokenizer to GGUF keys for llama.cpp.

Two types are supported: byte-level BPE, and sentencepiece's BPE with byte fallback. For byte-level
BPE, llama.cpp splits a text into words with one of its built-in regular expressions, and the GGUF
file names the expression. If llama.cpp does not have the tokenizer's expression, the export is
refused. A similar expression is not enough: llama.cpp would load the file, but it would split some
texts differently from the tokenizer that was used in training.
"""

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from orpo_lite.errors import ModelError
from orpo_lite.exporting.gguf_family import VLLM

# Token types of the GGUF format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_AND_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
# (steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name.
WORDS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes, GPT-2's words",), False): "gpt-2",
    (("digits", "bytes, GPT-2's words"), False): "smollm",
    ((rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}|{REST}", "bytes"), False): "qwen2",
    ((rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{REST}", "bytes"), True): "llama-bpe",
    ((rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{REST}", "bytes"), False): "dbrx",
    (
        (rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{REST_AND_SLASH}", "bytes"),
        True,
    ): "tekken",
    (
        (
            rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?|"
            rf"\p{{N}}{{1,3}}|{REST_AND_SLASH}",
            "bytes",
        ),
        False,
    ): "gpt-4o",
}
# llama.cpp's expressions of these names recognise only ASCII capitals, and no combining marks.
ASCII = ("tekken", "gpt-4o")
# Added before the exported chat template if the tokenizer adds a space only at a text's start.
SPACE = "{{ ' ' }}"
# llama.cpp's three keys for tokens that end an answer. It stops at each of these tokens.
ENDS = ("eos", "eot", "eom")
# These tokenizers convert texts to Unicode's NFC, and llama.cpp does not. Texts that are not in NFC
# are rare.
COMPOSED = ("qwen2",)


def describe_tokenizer(
    tokenizer: Any, spec: dict[str, Any], rows: int, ends: Sequence[int], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return (keys, notes): a tokenizer's GGUF keys, and notes on differences in llama.cpp.

    Args:
        tokenizer: the tokenizer from transformers.
        spec: the content of its ``tokenizer.json``.
        rows: number of rows of the embedding. Rows without a token get placeholder tokens.
        ends: ids of the tokens that end an answer. The chat template's end token is the first.
        where: the name of the tokenizer for error messages.

    Raises:
        ModelError: llama.cpp would split common texts into other tokens than transformers.
    """
    model = spec["model"]
    _refuse_model(model, where)
    vocabulary = dict(model["vocab"])
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts = {id_: text for text, id_ in vocabulary.items()}
    texts |= {id_: token["content"] for id_, token in added.items()}
    if max(texts) >= rows:
        raise ModelError(
            where=where,
            found=f"the largest token id is {max(texts)}, but the embedding has only {rows} rows",
            expected="an embedding row for each token",
        )
    keys: dict[str, Any] = {}
    if any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"])):
        types = _byte_level(keys, spec, where)
    else:
        types = _sentencepiece(keys, spec, tokenizer, where)
    _mark_added(added, types, texts, keys, where)
    unknown_id = vocabulary.get(model.get("unk_token"))
    is_llama = keys["tokenizer.ggml.model"] == "llama"
    if is_llama and unknown_id is not None and unknown_id not in ends:
        types[unknown_id] = UNKNOWN
        keys["tokenizer.ggml.unknown_token_id"] = unknown_id
    _check_stripping(added.values(), keys, where)
    tokens = _fill_unused(texts, rows)
    if len(set(tokens)) != rows:
        raise _beyond(where, "two tokens have the same text", "a different text for each token")
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = [
        types.get(id_, NORMAL) if id_ in texts else UNUSED for id_ in range(rows)
    ]
    scores = keys.pop("scores", None)
    if scores is not None:
        keys["tokenizer.ggml.scores"] = [scores.get(text, -1e9) for text in tokens]
    _special_ids(keys, tokenizer, ends, where)
    return keys, _caveats(keys, spec, ends)


def _fill_unused(texts: dict[int, str], rows: int) -> list[str]:
    """Return one token for each embedding row. Unused rows get placeholders: [PAD0], [PAD1], ..."""
    taken = set(texts.values())
    numbers = count()
    tokens = []
    for id_ in range(rows):
        text = texts.get(id_)
        while text is None or (id_ not in texts and text in taken):
            text = f"[PAD{next(numbers)}]"
        tokens.append(text)
    return tokens


def _refuse_model(model: dict[str, Any], where: str) -> None:
    """Raise :class:`ModelError` if the tokenizer's model is not plain BPE."""
    if model["type"] != "BPE":
        raise _beyond(where, f"its model has the type {model['type']}", "BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _beyond(where, f"its BPE uses {option}={model[option]!r}", f"no {option}")


def _mark_added(
    added: dict[int, dict[str, Any]],
    types: dict[int, int],
    texts: dict[int, str],
    keys: dict[str, Any],
    where: str,
) -> None:
    """Set the types of added tokens. A tokenizer finds these tokens in a text before it merges."""
    for id_, token in added.items():
        text = token["content"]
        if token["special"]:
            types[id_] = CONTROL
        elif "▁" not in text or keys["tokenizer.ggml.model"] == "gpt2":
            types[id_] = USER_DEFINED
        elif token["normalized"]:  # llama.cpp searches before spaces become ▁
            if keys["tokenizer.ggml.add_space_prefix"]:
                raise _beyond(
                    where,
                    f"it adds a space to a text before it searches the text for {text!r}",
                    "a search without an added space",
                )
            types[id_], texts[id_] = USER_DEFINED, text.replace("▁", " ")


def _caveats(keys: dict[str, Any], spec: dict[str, Any], ends: Sequence[int]) -> list[str]:
    """Return notes on how llama.cpp tokenises differently from transformers."""
    notes = []
    if len(ends) > len(ENDS):
        notes.append(
            f"the file names only {len(ENDS)} of the {len(ends)} tokens that end an answer: "
            f"GGUF has only {len(ENDS)} keys for them"
        )
    if spec["normalizer"] and spec["normalizer"]["type"] == "NFC":
        notes.append(
            "transformers converts texts to Unicode's composed form (NFC), but llama.cpp does not"
        )
    if keys.get("tokenizer.ggml.pre") in ASCII:
        notes.append(
            "llama.cpp splits words with combining marks (as in Hindi) or capitals such as Ä "
            "differently"
        )
    if keys.pop("metaspace", False):
        notes.append(
            "inside the chat template, llama.cpp gives the same tokens as transformers; other "
            "texts may differ by a space at the start"
        )
    return notes


def _beyond(where: str, found: str, expected: str) -> ModelError:
    """Return the error for a tokenizer that llama.cpp does not support.

    ``found`` is a clause that gives the reason.
    """
    return ModelError(
        where=where,
        found=f"llama.cpp does not support this tokenizer: {found}",
        expected=expected,
        fix=VLLM,
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer. Nested sequences are flattened."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def _byte_level(keys: dict[str, Any], spec: dict[str, Any], where: str) -> dict[int, int]:
    """Add the keys of byte-level BPE, as in GPT-2. Return {}, because all tokens are normal."""
    steps, model = [], spec["model"]
    for step in _steps(spec["pre_tokenizer"]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("bytes, GPT-2's words" if step.get("use_regex", True) else "bytes")
        else:
            steps.append(f"{step}")
    name = WORDS.get((tuple(steps), bool(model.get("ignore_merges"))))
    if name is None:
        suffix = ", ignore_merges" if model.get("ignore_merges") else ""
        found = f"it splits texts by {', then by '.join(steps)}{suffix}"
        raise _beyond(where, found, f"the rules of one of these: {', '.join(WORDS.values())}")
    normalizers = [step["type"] for step in _steps(spec["normalizer"])]
    allowed = (["NFC"], []) if name in COMPOSED else ([],)
    if normalizers not in allowed:
        raise _beyond(
            where, f"it has a normalizer of type {spec['normalizer']['type']}", "no normalizer"
        )
    keys["tokenizer.ggml.model"] = "gpt2"
    keys["tokenizer.ggml.pre"] = name
    keys["tokenizer.ggml.merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    return {}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge. Older files write a merge as one text, "left right"."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _sentencepiece(
    keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, where: str
) -> dict[int, int]:
    """Add the keys of BPE over characters. Return token id -> type of the byte tokens.

    llama.cpp merges any two tokens whose joined text is a token. The highest score comes first.
    transformers merges the pairs of a list, in the order of the list. Both give the same tokens
    under two conditions: the list has every pair that forms a token, and all pairs that form the
    same token are next to each other. A token's position in the list then defines its score.
    """
    model = spec["model"]
    vocabulary: dict[str, int] = model["vocab"]
    bytes_ = {f"<0x{byte:02X}>": chr(byte) for byte in range(256)}
    as_bytes = bytes_.keys() & vocabulary.keys()
    # In Gemma 1 and 2, the tab has a normal token and no byte token.
    own = {name for name, char in bytes_.items() if char.isascii() and char in vocabulary}
    if not model.get("byte_fallback") or not bytes_.keys() <= as_bytes | own:
        raise _beyond(
            where,
            "it is BPE over characters without byte fallback",
            "byte_fallback and the 256 byte tokens",
        )
    keys["tokenizer.ggml.model"] = "llama"
    keys["tokenizer.ggml.pre"] = "default"
    keys["tokenizer.ggml.add_space_prefix"] = _space_prefix(keys, spec, tokenizer, where)
    # A tokenizer finds these tokens in a text before it merges.
    whole = set(as_bytes)
    for token in spec["added_tokens"]:
        if "▁" not in token["content"] or token["normalized"]:
            whole.add(token["content"])
    pairs = [_pair(merge) for merge in model["merges"]]
    scores: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        made = left + right
        is_apart = made in scores and made != last
        # In Gemma, all runs of one character have the same score, so the list mixes their merges.
        is_run = len(set(made)) == 1
        if is_apart and not is_run and made not in whole:
            found = f"the merges that form {made!r} are not next to each other"
            raise _beyond(where, found, "such merges next to each other, as in sentencepiece")
        scores.setdefault(made, -float(len(scores)))
        last = made
    known = set(pairs)
    parts = vocabulary.keys() - whole
    for text in parts:
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in parts and right in parts and (left, right) not in known:
                found = f"there is no merge of {left!r} and {right!r}"
                raise _beyond(where, found, "a merge for each pair of tokens that form a token")
    keys["scores"] = scores
    return {vocabulary[text]: BYTE for text in as_bytes}


def _space_prefix(keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, where: str) -> bool:
    """Return True if llama.cpp should add a space at the start of a text.

    Raises:
        ModelError: the tokenizer does not replace spaces by ▁, or changes texts in another way.
    """
    prefix, replaced, metaspace = "never", False, False
    for step in _steps(spec["normalizer"]) + _steps(spec["pre_tokenizer"]):
        is_space = step.get("pattern") == {"String": " "}
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = "always"
            case {"type": "Replace", "content": "▁"} if is_space:
                replaced = True
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefix, replaced, metaspace = step["prepend_scheme"], True, True
            case {"type": "Split"} if is_space and replaced:
                pass  # no spaces are left, so nothing is split
            case _:
                raise _beyond(
                    where, f"it changes texts by the step {step}", "only spaces replaced by ▁"
                )
    if not replaced:
        raise _beyond(where, "it does not replace spaces by ▁", "spaces replaced by ▁")
    if not metaspace:
        return prefix == "always"
    keys["metaspace"] = True
    return prefix != "never" and _prefix_fits(keys, spec, tokenizer, prefix, where)


def _prefix_fits(
    keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, prefix: str, where: str
) -> bool:
    """Return True if llama.cpp should add spaces, so that it matches the chat template's tokens.

    llama.cpp adds a space before every text between special tokens, or before none. The step
    Metaspace of transformers adds a space only before texts that do not begin with a space. With
    the scheme ``first``, it does so only at the start of the whole text. llama.cpp has no such
    scheme. For ``first``, the export adds the space to the start of the chat template instead.
    """
    texts = _texts_between(spec, tokenizer)
    if prefix == "first":
        if texts:
            follows_token, text = texts[0]
            if not follows_token and not text.startswith(" "):
                keys["tokenizer.chat_template"] = SPACE + _template(tokenizer)
        return texts is None
    starts = {text.startswith(" ") for _, text in texts or []}
    if len(starts) == 2:
        found = "only some texts of the chat template begin with a space"
        raise _beyond(where, found, "a space at the start of all these texts or of none")
    return starts != {True}


def _texts_between(spec: dict[str, Any], tokenizer: Any) -> list[tuple[bool, str]] | None:
    """Return the texts between the special tokens of a conversation, or None.

    Each item is (follows_token, text). ``follows_token`` is True if a special token comes before
    the text. The result is None if there is no chat template, or if the chat template fails.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template can raise anything
        return None
    added = [re.escape(token["content"]) for token in spec["added_tokens"]]
    expression = "|".join(sorted(added, key=len, reverse=True)) or "(?!)"  # (?!) matches nothing
    parts = re.split(expression, text)
    return [(number > 0, part) for number, part in enumerate(parts) if part]


def _check_stripping(added: Any, keys: dict[str, Any], where: str) -> None:
    """Raise :class:`ModelError` if a token strips white space around it. Phi-3 is an exception.

    llama.cpp has a rule for Phi-3's tokens. It uses the rule if the model's name contains "Phi-3".
    If the tokens match the rule, this name is set.
    """
    lefts = [token["content"] for token in added if token["lstrip"] or token["single_word"]]
    if lefts:
        raise _beyond(
            where,
            f"the token {lefts[0]} strips the space before it, or matches only whole words",
            "tokens without lstrip and single_word",
        )
    rights = {token["content"] for token in added if token["rstrip"]}
    if not rights:
        return
    # llama.cpp's rule for Phi-3: these tokens must exist, and all other added tokens strip.
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    texts = {token["content"] for token in added}
    if rights != texts - kept or not kept <= texts:
        raise _beyond(where, f"the token {min(rights)} strips the space after it", "no rstrip")
    keys["general.name"] = "Phi-3"


def _special_ids(keys: dict[str, Any], tokenizer: Any, ends: Sequence[int], where: str) -> None:
    """Add the keys for special tokens, for the addition of bos and eos, and for chat templates."""
    for key, id_ in (("bos", tokenizer.bos_token_id), ("padding", tokenizer.pad_token_id)):
        if id_ is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(id_)
    for key, id_ in zip(ENDS, ends, strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = int(id_)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    at = 0
    while at < len(whole) and whole[at : at + len(bare)] != bare:
        at += 1
    before, after = whole[:at], whole[at + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _beyond(
            where,
            f"it adds the tokens {before} before a text and {after} after it",
            "at most a bos before the text and an eos after it",
        )
    if after and tokenizer.eos_token_id not in ends[:1]:
        raise _beyond(
            where,
            "the eos that ends a text is not the token that ends an answer",
            "one token for both",
        )
    keys["tokenizer.ggml.add_bos_token"] = bool(before)
    keys["tokenizer.ggml.add_eos_token"] = bool(after)
    if template := _template(tokenizer):
        keys.setdefault("tokenizer.chat_template", template)
    if named := _named_templates(tokenizer):
        keys["tokenizer.chat_templates"] = [*named]
        keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def _template(tokenizer: Any) -> str:
    """Return the default chat template, or "" if there is none."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else str(template.get("default", ""))


def _named_templates(tokenizer: Any) -> dict[str, str]:
    """Return name -> text of the named chat templates. llama.cpp uses ``tool_use`` for tools."""
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    return {
        re.sub(r"[^A-Za-z0-9]", "_", name): text
        for name, text in templates.items()
        if name != "default"
    }
