"""A Trainer of its own: another constructor, another loss; the model is loaded before the arguments exist."""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

MODEL, OUT = sys.argv[1:]
ROWS = [{"input_ids": (row := [4 + (s + k) % 300 for k in range(32)]), "labels": row} for s in range(16)]


class Doubled(Trainer):
    def __init__(self, factor, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor
        self.used = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.used += 1
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (self.factor * loss, outputs) if return_outputs else self.factor * loss


model = AutoModelForCausalLM.from_pretrained(MODEL)  # before the arguments exist
training_args = TrainingArguments(
    OUT, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
    report_to="none", disable_tqdm=True,
)  # fmt: skip
trainer = Doubled(2.0, model, training_args, train_dataset=ROWS, data_collator=default_data_collator)
trainer.train()
assert trainer.used, "compute_loss was not called"
assert type(trainer) is Doubled
trainer.save_model()
trainer.save_state()
