"""Write the section "How to load it" of a model card."""

import json

from orpo_lite.base.adapter import vllm_rank
from orpo_lite.publishing.card_facts import Facts

Block = tuple[str, str, str]  # title, language and text of a block of code

OLLAMA = (
    "Ollama needs a GGUF file, which is not in this repository. `orpo-lite export RUN --to ollama` "
    "makes one from the run folder. It also writes a Modelfile with the template and the stop "
    "tokens of this model. Without these two, Ollama would guess them."
)
SCORE_HEAD = (
    "vLLM does not load the score head of an adapter. It serves the merged model, which "
    "`orpo-lite merge RUN` makes from the run folder."
)
AS_VLLM_SAYS = (
    "The reward is the only number in `probs` of the answer. These two commands are written as "
    "vLLM's documentation describes them."
)
TURNS = (
    {"role": "user", "content": "How long does tea brew?"},
    {"role": "assistant", "content": "Three minutes."},
)
OTHER_REPLY = "I like tea."


def loading_section(facts: Facts) -> str:
    """Return the section of the card that shows how to load the model."""
    parts = ["## How to load it"]
    if not facts.is_hub_base and not facts.options.merged:
        is_toy = facts.recipe.model.model_name_or_path.startswith("builtin:")
        where = "which orpo-lite writes to runs/builtin" if is_toy else "which is not named here"
        parts.append(f"`BASE` is the model that the adapter was trained on, {where}.")
    if facts.is_reward_model:
        blocks, notes = _reward_model(facts)
    else:
        blocks, notes = _language_model(facts)
    parts += [f"{title}:\n\n```{language}\n{text}\n```" for title, language, text in blocks]
    return "\n\n".join([*parts, *notes])


def _language_model(facts: Facts) -> tuple[list[Block], list[str]]:
    """Return the blocks of code for a language model, and the paragraphs after them."""
    repository, merged = facts.options.repository, facts.options.merged
    python = _python(facts, "AutoModelForCausalLM")
    if merged:
        return [
            ("transformers", "python", python),
            ("vLLM", "sh", f"vllm serve {repository}"),
        ], [OLLAMA]
    blocks = [("transformers and PEFT", "python", python)]
    rank = vllm_rank(facts.adapter, facts.lock["base"])
    if rank is None:
        return blocks, ["vLLM cannot serve this adapter: merge it first.", OLLAMA]
    revision = facts.lock["base"]["revision"]
    vllm = f"vllm serve {facts.base_name}" + (f" --revision {revision}" if revision else "")
    # They hold the chat template and the end tokens.
    vllm += f" --tokenizer {repository} --generation-config {repository}"
    vllm += f" --enable-lora --lora-modules tuned={repository} --max-lora-rank {rank}"
    return [*blocks, ("vLLM", "sh", vllm)], [OLLAMA]


def _reward_model(facts: Facts) -> tuple[list[Block], list[str]]:
    """Return the blocks of code for a reward model, and the paragraphs after them."""
    python = _python(facts, "AutoModelForSequenceClassification") + _scoring(facts)
    if not facts.options.merged:
        return [("transformers and PEFT", "python", python)], [SCORE_HEAD]
    repository = facts.options.repository
    request: dict[str, object] = {"model": repository, "messages": TURNS}
    kwargs = facts.recipe.data.chat_template_kwargs
    if facts.recipe.data.chat_template == "none":
        request = {"model": repository, "input": "PROMPT, REPLY AND END TOKEN"}
    elif kwargs:
        request["chat_template_kwargs"] = kwargs
    body = json.dumps({**request, "use_activation": False}, indent=2).replace("'", "\\u0027")
    vllm = (
        f"vllm serve {repository} --runner pooling\n"
        f"curl localhost:8000/classify -H 'Content-Type: application/json' -d '{body}'"
    )
    return [("transformers", "python", python), ("vLLM", "sh", vllm)], [AS_VLLM_SAYS]


def _python(facts: Facts, kind: str) -> str:
    """Return the code that loads the tokenizer and the model, which gets the name ``model``.

    ``kind``: the name of the class of transformers that loads the model.
    """
    repository, merged = facts.options.repository, facts.options.merged
    revision = facts.lock["base"]["revision"]
    options = 'dtype="auto", device_map="auto"'
    lines = ["import torch"] if facts.is_reward_model else []
    lines += [] if merged else ["from peft import PeftModel"]
    lines += [f"from transformers import {kind}, AutoTokenizer", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repository}")']
    if merged:
        lines += [f'model = {kind}.from_pretrained("{repository}", {options})']
    else:
        if facts.is_reward_model:
            lines += ["# transformers warns that score.weight is new. The adapter replaces it."]
            options = f"num_labels=1, {options}"
        at = f'revision="{revision}", ' if revision else ""
        lines += [f'base = {kind}.from_pretrained("{facts.base_name}", {at}{options})']
        lines += [f'model = PeftModel.from_pretrained(base, "{repository}")']
        if facts.is_reward_model:
            lines += ["model.config.pad_token_id = tokenizer.pad_token_id"]
    return "\n".join(lines)


def _scoring(facts: Facts) -> str:
    """Return the code that prints the rewards of two replies to the same prompt."""
    data = facts.recipe.data
    prompt, reply = (turn["content"] for turn in TURNS)
    if data.chat_template == "none":
        texts = [
            "# Prompt and reply are joined as they are in the training data.",
            f'texts = ["{prompt} {reply}", "{prompt} {OTHER_REPLY}"]',
            'has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id',
            'start = tokenizer.bos_token if has_bos else ""',
            "texts = [start + text + tokenizer.eos_token for text in texts]",
        ]
    else:
        variables = f", **{data.chat_template_kwargs!r}" if data.chat_template_kwargs else ""
        texts = [
            "conversations = [",
            "    [",
            f'        {{"role": "user", "content": "{prompt}"}},',
            '        {"role": "assistant", "content": reply},',
            "    ]",
            f'    for reply in ("{reply}", "{OTHER_REPLY}")',
            "]",
            "texts = [",
            f"    tokenizer.apply_chat_template(turns, tokenize=False{variables})",
            "    for turns in conversations",
            "]",
        ]
    if facts.can_pad:
        scores = [
            "inputs = tokenizer(",
            '    texts, add_special_tokens=False, padding=True, padding_side="right",',
            '    return_token_type_ids=False, return_tensors="pt",',
            ").to(model.device)",
            "with torch.no_grad():",
            "    rewards = model(**inputs).logits[:, 0].tolist()",
        ]
    else:
        scores = [
            "rewards = []",
            "for text in texts:  # one at a time, because the tokenizer has no pad token",
            "    inputs = tokenizer(",
            "        text, add_special_tokens=False, return_token_type_ids=False,",
            '        return_tensors="pt",',
            "    ).to(model.device)",
            "    with torch.no_grad():",
            "        rewards += model(**inputs).logits[0].tolist()",
        ]
    return "\n".join(["", "model.eval()", *texts, *scores, "print(rewards)"])
