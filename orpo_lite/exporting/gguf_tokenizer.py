"""A tokenizer as llama.cpp knows it: byte-level BPE, or sentencepiece's BPE with bytes to fall back on.

llama.cpp cuts a text into words by a regular expression that it knows by name. A tokenizer whose expression is not
among those below is refused: under a wrong name a file loads, and tokenises a little differently than in training.
"""

import re
from collections.abc import Sequence
from typing import Any

from orpo_lite.errors import ModelError
from orpo_lite.exporting.gguf_family import VLLM

# What kind a token is, of the file format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_AND_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
# Each as the steps of a pre-tokenizer, and whether a word that is a token is taken whole -> llama.cpp's name.
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
ASCII = (
    "tekken",
    "gpt-4o",
)  # llama.cpp's expression for these tells capitals in ASCII alone, and no combining marks
SPACE = "{{ ' ' }}"  # a chat template in a file begins with it where a text gets a space at its start alone
ENDS = (
    "eos",
    "eot",
    "eom",
)  # the tokens that end an answer have three names there, all of them respected
COMPOSED = (
    "qwen2",
)  # brought to Unicode's composed form first; llama.cpp leaves that out, and such texts are rare


def describe_tokenizer(
    tokenizer: Any, spec: dict[str, Any], rows: int, ends: Sequence[int], where: str
) -> tuple[dict[str, Any], list[str]]:
    """The keys of a tokenizer, and what is not quite the same there.

    Args:
        tokenizer: transformers' tokenizer.
        spec: its ``tokenizer.json``, as it is in memory.
        rows: of the embedding: each has a token, a made-up one at the end if need be.
        ends: ids at which an answer ends, the template's own end first.
        where: what to call it in messages.

    Raises:
        ModelError: what llama.cpp cannot tokenise in the same way.
    """
    model = spec["model"]
    _refuse_model(model, where)
    vocabulary = dict(model["vocab"])
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts = {id_: text for text, id_ in vocabulary.items()} | {
        id_: token["content"] for id_, token in added.items()
    }
    if max(texts) >= rows:
        raise ModelError(
            where=where,
            found=f"the id {max(texts)} is beyond the embedding's {rows} rows",
            expected="an embedding of its size",
        )
    keys: dict[str, Any] = {}
    if any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"])):
        kinds = _byte_level(keys, spec, where)
    else:
        kinds = _sentencepiece(keys, spec, tokenizer, where)
    _mark_added(added, kinds, texts, keys, where)
    unknown = model.get("unk_token")
    if (
        unknown in vocabulary
        and keys["tokenizer.ggml.model"] == "llama"
        and vocabulary[unknown] not in ends
    ):
        kinds[vocabulary[unknown]] = UNKNOWN
        keys["tokenizer.ggml.unknown_token_id"] = vocabulary[unknown]
    _stripping(added.values(), keys, where)
    taken = set(texts.values())
    spare = (text for number in range(rows + len(taken)) if (text := f"[PAD{number}]") not in taken)
    tokens = [texts[id_] if id_ in texts else next(spare) for id_ in range(rows)]
    if len(set(tokens)) != rows:
        raise _beyond(where, "two tokens of the same text", "a text for each token")
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = [
        kinds.get(id_, NORMAL) if id_ in texts else UNUSED for id_ in range(rows)
    ]
    scores = keys.pop("scores", None)
    if scores is not None:
        keys["tokenizer.ggml.scores"] = [scores.get(text, -1e9) for text in tokens]
    _special_ids(keys, tokenizer, ends, where)
    return keys, _caveats(keys, spec, ends)


def _refuse_model(model: dict[str, Any], where: str) -> None:
    if model["type"] != "BPE":
        raise _beyond(where, f"a model of type {model['type']}", "BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _beyond(where, f"BPE with {option}: {model[option]!r}", "none")


def _mark_added(
    added: dict[int, dict[str, Any]],
    kinds: dict[int, int],
    texts: dict[int, str],
    keys: dict[str, Any],
    where: str,
) -> None:
    """What kind the added tokens are: those that are found in a text before any merge."""
    for id_, token in added.items():
        text = token["content"]
        if token["special"]:
            kinds[id_] = CONTROL
        elif "▁" not in text or keys["tokenizer.ggml.model"] == "gpt2":
            kinds[id_] = USER_DEFINED
        elif token["normalized"]:  # looked for once spaces are ▁; llama.cpp looks before that
            if keys["tokenizer.ggml.add_space_prefix"]:
                raise _beyond(
                    where, f"{text!r} is looked for behind a space that was added", "no such space"
                )
            kinds[id_], texts[id_] = USER_DEFINED, text.replace("▁", " ")


def _caveats(keys: dict[str, Any], spec: dict[str, Any], ends: Sequence[int]) -> list[str]:
    notes = []
    if len(ends) > len(ENDS):
        notes.append(f"the file names {len(ENDS)} tokens that end an answer, of {len(ends)}")
    if spec["normalizer"] and spec["normalizer"]["type"] == "NFC":
        notes.append(
            "texts in Unicode's decomposed form are composed by transformers, not by llama.cpp"
        )
    if keys.get("tokenizer.ggml.pre") in ASCII:
        notes.append(
            "llama.cpp cuts words with combining marks (Hindi) or capitals like Ä inside otherwise than here"
        )
    if keys.pop("metaspace", False):
        notes.append(
            "the file's tokens are those of the chat template; a bare text may get or lack a first space"
        )
    return notes


def _beyond(where: str, found: str, expected: str) -> ModelError:
    return ModelError(
        where=where,
        found=f"{found}, which llama.cpp cannot tokenise alike",
        expected=expected,
        fix=VLLM,
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def _byte_level(keys: dict[str, Any], spec: dict[str, Any], where: str) -> dict[int, int]:
    """BPE over bytes written as printable characters, GPT-2's way; its merges as they are."""
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
        found = f"words are cut by {' then '.join(steps)}" + (
            ", ignore_merges" if model.get("ignore_merges") else ""
        )
        raise _beyond(where, found, f"the words of {', '.join(WORDS.values())}")
    normal = _steps(spec["normalizer"])
    if normal and not (name in COMPOSED and [step["type"] for step in normal] == ["NFC"]):
        raise _beyond(
            where, f"texts are normalised by {spec['normalizer']['type']}", "no normalizer"
        )
    keys["tokenizer.ggml.model"] = "gpt2"
    keys["tokenizer.ggml.pre"] = name
    keys["tokenizer.ggml.merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    return {}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _sentencepiece(
    keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, where: str
) -> dict[int, int]:
    """BPE over characters. llama.cpp joins any two tokens that make a token, those with the highest score first.

    transformers joins the pairs of a list, in its order. Both do the same when the list holds every such pair, and
    those that make one token stand together: then the place of that token in the list is its score.
    """
    model = spec["model"]
    vocabulary: dict[str, int] = model["vocab"]
    bytes_ = {f"<0x{byte:02X}>": chr(byte) for byte in range(256)}
    as_bytes = bytes_.keys() & vocabulary.keys()
    # A tab is a token of its own in Gemma 1 and 2, in the place of its byte: nothing falls back on that.
    own = {
        name
        for name, character in bytes_.items()
        if character.isascii() and character in vocabulary
    }
    if not model.get("byte_fallback") or not bytes_.keys() <= as_bytes | own:
        raise _beyond(
            where,
            "BPE over characters without bytes to fall back on",
            "byte_fallback and its 256 tokens",
        )
    keys["tokenizer.ggml.model"] = "llama"
    keys["tokenizer.ggml.pre"] = "default"
    keys["tokenizer.ggml.add_space_prefix"] = _space_prefix(keys, spec, tokenizer, where)
    # Found in a text before any merge.
    added = spec["added_tokens"]
    whole = as_bytes | {
        token["content"] for token in added if "▁" not in token["content"] or token["normalized"]
    }
    pairs = [_pair(merge) for merge in model["merges"]]
    scores: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        made = left + right
        # Gemma's runs of one character are of one score there, and so dealt among each other here.
        if made in scores and made != last and len(set(made)) > 1 and made not in whole:
            raise _beyond(
                where,
                f"the merges that make {made!r} do not stand together",
                "those of sentencepiece",
            )
        scores.setdefault(made, -float(len(scores)))
        last = made
    known = set(pairs)
    parts = vocabulary.keys() - whole
    for text in parts:
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        lost = [cut for cut in cuts if cut not in known and cut[0] in parts and cut[1] in parts]
        if lost:
            raise _beyond(
                where,
                f"no merge makes {text!r} of {lost[0][0]!r} and {lost[0][1]!r}",
                "a merge for each pair",
            )
    keys["scores"] = scores
    return {vocabulary[text]: BYTE for text in as_bytes}


def _space_prefix(keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, where: str) -> bool:
    """Whether a text is given a space at its start; and that spaces are all that is changed in it."""
    prefix, replaced, metaspace = "never", False, False
    for step in _steps(spec["normalizer"]) + _steps(spec["pre_tokenizer"]):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = "always"
        elif (
            step["type"] == "Replace"
            and step["pattern"] == {"String": " "}
            and step["content"] == "▁"
        ):
            replaced = True
        elif (
            step["type"] == "Metaspace"
            and step["replacement"] == "▁"
            and not step.get("split", True)
        ):
            prefix, replaced, metaspace = step["prepend_scheme"], True, True
        elif not (
            step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced
        ):  # there are none left
            raise _beyond(where, f"texts are changed by {step}", "spaces that become ▁")
    if not replaced:
        raise _beyond(where, "spaces stay spaces", "spaces that become ▁")
    if not metaspace:
        return prefix == "always"
    keys["metaspace"] = True
    return prefix != "never" and _prefix_fits(keys, spec, tokenizer, prefix, where)


def _prefix_fits(
    keys: dict[str, Any], spec: dict[str, Any], tokenizer: Any, prefix: str, where: str
) -> bool:
    """What fits the chat template best, where a space is only put before a text that has none.

    llama.cpp puts one before each text between special tokens, or before none. transformers' Metaspace looks whether
    there is one already, and of the kind ``first`` puts one before the start of the whole alone: the file's own chat
    template then begins with it.
    """
    texts = _texts_between(spec, tokenizer)
    if prefix == "first":
        if texts and not texts[0][0] and not texts[0][1].startswith(" "):
            keys["tokenizer.chat_template"] = SPACE + _template(tokenizer)
        return texts is None
    begin = {text.startswith(" ") for _, text in texts or []}
    if len(begin) == 2:
        found = (
            "a space is put before texts of the chat template that have none, and others have one"
        )
        raise _beyond(where, found, "the same for all")
    return begin != {True}


def _texts_between(spec: dict[str, Any], tokenizer: Any) -> list[tuple[bool, str]] | None:
    """The texts between special tokens of a conversation, and whether a token stands before each; None: no template."""
    if not tokenizer.chat_template:
        return None
    talk = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template can raise anything
        return None
    added = sorted(
        (re.escape(token["content"]) for token in spec["added_tokens"]), key=len, reverse=True
    )
    parts = re.split("|".join(added) or "(?!)", text)
    return [(number > 0, part) for number, part in enumerate(parts) if part]


def _stripping(added: Any, keys: dict[str, Any], where: str) -> None:
    """Tokens that eat the white space beside them: llama.cpp knows Phi-3's, by the model's name."""
    lefts = [token["content"] for token in added if token["lstrip"] or token["single_word"]]
    if lefts:
        raise _beyond(
            where,
            f"{lefts[0]} takes the space before it, or stands for whole words only",
            "plain tokens",
        )
    rights = {token["content"] for token in added if token["rstrip"]}
    if not rights:
        return
    kept = {
        "<unk>",
        "<s>",
        "<|endoftext|>",
    }  # all others, by llama.cpp's rule for that name, which needs these
    texts = {token["content"] for token in added}
    if rights != texts - kept or not kept <= texts:
        raise _beyond(where, f"{min(rights)} takes the space after it", "plain tokens, or Phi-3's")
    keys["general.name"] = "Phi-3"


def _special_ids(keys: dict[str, Any], tokenizer: Any, ends: Sequence[int], where: str) -> None:
    for name, key in (("bos", "bos"), ("pad", "padding")):
        if (id_ := getattr(tokenizer, f"{name}_token_id")) is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(id_)
    for key, id_ in zip(ENDS, ends, strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = int(id_)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    before, after = whole[:at], whole[at + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _beyond(
            where,
            f"a text is put between {before} and {after}",
            "a bos before it, or an eos after it",
        )
    if after and tokenizer.eos_token_id not in ends[:1]:
        raise _beyond(where, "the eos after a text does not end answers", "one token for both")
    keys["tokenizer.ggml.add_bos_token"] = bool(before)
    keys["tokenizer.ggml.add_eos_token"] = bool(after)
    if template := _template(tokenizer):
        keys.setdefault("tokenizer.chat_template", template)
    if named := _named_templates(tokenizer):
        keys["tokenizer.chat_templates"] = [*named]
        keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else str(template.get("default", ""))


def _named_templates(tokenizer: Any) -> dict[str, str]:
    """Those besides the default one, which llama.cpp takes for tools (``tool_use``) and documents."""
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    return {
        re.sub(r"[^A-Za-z0-9]", "_", name): text
        for name, text in templates.items()
        if name != "default"
    }
