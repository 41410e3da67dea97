"""A script with everything written into it; the folder of the model and the output are its two arguments."""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

MODEL, OUT = sys.argv[1:]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.tensor([4 + (index + (index % 5 + 1) * k) % 300 for k in range(32)])
        return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    training_args = TrainingArguments(
        output_dir=OUT,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    trainer = Trainer(model=model, args=training_args, train_dataset=Rows(), data_collator=default_data_collator)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
