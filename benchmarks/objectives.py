"""Compare the steps of DPO and SFT with those of TRL's trainers on the same pairs.

    python -m benchmarks.objectives --json FILE

DPO: pairs per second, in one process, with alternating steps. Both have the reference
log-probabilities of all pairs before the first step. SFT: tokens that go through the model; TRL
packs sequences into rows of 2,048 tokens. The lengths of the pairs are real; their tokens are
random.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, pack_dataset

from benchmarks import lengths, peers
from benchmarks.ours import BATCH, SETS, our_step, recipe
from benchmarks.step import LORA, about, small_llama, tokenizer
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.load import load_pair_model

WIDTH = 2_048  # tokens of TRL's packed rows


class Known(DPOTrainer):  # type: ignore[misc]
    """A DPOTrainer whose reference log-probabilities are known.

    TRL would compute them at the start, without gradients. On some CPUs bitsandbytes then repacks
    the 4-bit weights, and no gradient passes through them any more.
    """

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        zeros = [0.0] * len(dataset)
        return dataset.add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)


def make_dpo_trainer(folder: str) -> Any:
    """Return a DPOTrainer on the 4-bit base in ``folder``, ready for :func:`trl_step`."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantised
    )
    arguments = DPOConfig(
        output_dir=f"{folder}/trl",
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
        per_device_train_batch_size=BATCH,
        precompute_ref_log_probs=True,
        max_length=WIDTH,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = Known(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model.train())
    return trainer


def dpo_row(pair: TokenizedPair) -> dict[str, Any]:
    """Return a pair as DPOTrainer's dataset holds it."""
    start = pair.chosen_start
    chosen, rejected = (
        [int(token) for token in ids] for ids in (pair.chosen_ids, pair.rejected_ids)
    )
    return {
        "prompt_ids": chosen[:start],
        "chosen_ids": chosen[start:],
        "rejected_ids": rejected[start:],
        "ref_chosen_logps": pair.ref_chosen * (len(chosen) - start),
        "ref_rejected_logps": pair.ref_rejected * (len(rejected) - start),
    }


def trl_step(trainer: Any, pairs: Sequence[TokenizedPair]) -> float:
    """Take one optimizer step of DPOTrainer and return its loss."""
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([dpo_row(pair) for pair in pairs])
    loss = float(trainer.training_step(trainer.model_wrapped, batch))
    peers.update(trainer)
    return loss


def pairs_per_second(triples: lengths.Triples, batches: int) -> dict[str, float]:
    """Time both on the same batches, one after the other; the first batch is not timed."""
    chosen = lengths.near_mean(triples, BATCH, batches)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(small_llama()).to(torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        settings = recipe().override(
            {
                "model.dtype": "bfloat16",
                "model.model_name_or_path": folder,
                "loss.type": "dpo",
            }
        )
        model = load_pair_model(
            settings, fetch_weights(find_base(folder, "main")), torch.device("cpu")
        )
        optimizer = bnb.optim.PagedAdamW8bit([p for _, p in model.trained()], lr=1e-4)
        trainer = make_dpo_trainer(folder)
        adapter = dict(model.trained())
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(adapter[name])
        seconds, losses = {"ours": 0.0, "trl": 0.0}, {"ours": 0.0, "trl": 0.0}
        for number, lengths_of_batch in enumerate([chosen[0], *chosen]):
            pairs = [
                # The values are those of an untrained model: log 1/V for each token.
                replace(pair, ref_chosen=-10.37, ref_rejected=-10.37)
                for pair in lengths.random_pairs(lengths_of_batch, 32_000, seed=number)
            ]
            for tool in ("ours", "trl"):
                gc.collect()
                began = time.perf_counter()
                if tool == "ours":
                    losses[tool] = our_step(model, optimizer, pairs, settings)
                else:
                    losses[tool] = trl_step(trainer, pairs)
                if number > 0:
                    seconds[tool] += time.perf_counter() - began
    count = BATCH * len(chosen)
    return {
        "ratio": seconds["trl"] / seconds["ours"],
        "pairs_per_second_ours": count / seconds["ours"],
        "pairs_per_second_trl": count / seconds["trl"],
        "final_loss_ours": losses["ours"],
        "final_loss_trl": losses["trl"],
    }


def sft_tokens(triples: lengths.Triples) -> dict[str, float]:
    """Return the tokens of the chosen sequences that go through the model, over TRL's.

    TRL packs by best-fit decreasing. Its rows are padded to the longest row of a batch, unless
    FlashAttention is installed, with which it pads nothing.
    """
    counts = triples[:, 1]
    rows = Dataset.from_list([{"input_ids": [3] * min(int(count), WIDTH)} for count in counts])
    packed = pack_dataset(rows, seq_length=WIDTH, strategy="bfd")
    sizes = [len(ids) for ids in packed["input_ids"]]
    padded = sum(
        max(sizes[start : start + BATCH]) * len(sizes[start : start + BATCH])
        for start in range(0, len(sizes), BATCH)
    )
    ours = int(counts.sum())
    return {
        "ratio_to_padded_rows": ours / padded,
        "ratio_without_padding": ours / sum(sizes),
        "tokens": ours,
    }


def main() -> None:
    """Run the benchmark, print its figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    result: dict[str, Any] = {"goals": {"dpo ratio": ">= 4", "sft ratio": "<= 1.0"}}
    for name, file in SETS.items():
        triples = lengths.shipped(file)
        result[f"sft_tokens_{name}"] = sft_tokens(triples)
        result[f"dpo_pairs_per_second_{name}"] = pairs_per_second(triples, 3)
        print(json.dumps(result, indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result | about(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
