"""Continued pre-training on your own text with the plain Trainer, any preset.

    accelerate launch recipes/continued_pretraining.py --ds_preset zero3 --model_name_or_path MODEL \
        --train_file text.jsonl --block_size 1024 --output_dir runs/cpt

Data: JSONL with `text`, or --dataset_name.  Documents are joined with the end-of-text token and cut into blocks.
"""

import dataclasses
import itertools

from transformers import AutoTokenizer, Trainer, default_data_collator
from trl import ModelConfig, TrlParser

from hf_dsvllm import DsvllmTrainingArguments, friendly, prepare
from hf_dsvllm.data import DataArguments, load_split


@dataclasses.dataclass
class TextArguments(DataArguments):
    block_size: int = dataclasses.field(default=1024, metadata={"help": "Tokens in one training sequence."})


@friendly
def main() -> None:
    parser = TrlParser((TextArguments, DsvllmTrainingArguments, ModelConfig))
    data, args, model_args = parser.parse_args_and_config()
    train, test = load_split(data, needs_test=args.eval_strategy != "no", columns=("text",))
    session = prepare(args, model_args)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)

    def pack(batch: dict) -> dict:
        documents = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        tokens = list(itertools.chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in documents))
        usable = len(tokens) - len(tokens) % data.block_size
        blocks = [tokens[start : start + data.block_size] for start in range(0, usable, data.block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    with args.main_process_first(desc="tokenising"):
        train, test = (
            split and split.map(pack, batched=True, remove_columns=split.column_names) for split in (train, test)
        )
    trainer = Trainer(
        model=session.load_model(),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    session.attach(trainer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
