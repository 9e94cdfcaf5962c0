"""SAM with AdamW trains a small GPT-2 in transformers' Trainer to write Python, byte by byte.

    python examples/transformers_text.py [--epochs 1] [--samples 400]
"""

from __future__ import annotations

import argparse
import math
import tempfile

import torch
from data import source_text
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainingArguments, set_seed

from fused_sam import SAM
from fused_sam.integrations.transformers import SAMTrainer

LENGTH = 64  # bytes per sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1600, help=f"training samples of {LENGTH} bytes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    held_out = max(8, options.samples // 10)
    rows = source_text((options.samples + held_out) * LENGTH).view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))]
    samples = [{"input_ids": row, "labels": row} for row in rows]

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SAMTrainer(
            model,
            TrainingArguments(
                folder,
                use_cpu=not torch.cuda.is_available(),
                num_train_epochs=options.epochs,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=samples[held_out:],
            eval_dataset=samples[:held_out],
            optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 3e-3}),
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    before, after = before / math.log(2), after / math.log(2)
    print(f"bits per byte on held-out source: {before:.2f} before training, {after:.2f} after")


if __name__ == "__main__":
    main()
