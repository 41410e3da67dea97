"""A script of the run_clm kind: three dataclasses through HfArgumentParser, no word of PEFT or DeepSpeed in it."""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default=None, metadata={"help": "The model to train."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(default=None, metadata={"help": "JSONL with a text column."})
    block_size: int = field(default=32)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    def encode(row):
        tokens = tokenizer(row["text"], truncation=True, padding="max_length", max_length=data_args.block_size)
        return {**tokens, "labels": tokens["input_ids"]}

    data = load_dataset("json", data_files=data_args.train_file, split="train")
    data = data.map(encode, remove_columns=data.column_names, load_from_cache_file=False, keep_in_memory=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
