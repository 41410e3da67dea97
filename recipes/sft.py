"""Supervised fine-tuning with TRL's SFTTrainer, any preset, and vLLM answering evaluation prompts while it trains.

    accelerate launch recipes/sft.py --ds_preset zero2 --model_name_or_path MODEL --train_file train.jsonl \
        --gen_eval_file eval.jsonl --gen_eval_metrics json_equal --output_dir runs/sft

torchrun and plain `python` (one process) work alike.  Data: JSONL in TRL's formats (messages; prompt and completion;
text), or --dataset_name.  All of TRL's SFTConfig and ModelConfig flags are accepted, and --config FILE.yaml.
"""

from trl import ModelConfig, SFTTrainer, TrlParser

from hf_dsvllm import DsvllmSFTConfig, friendly, prepare
from hf_dsvllm.data import DataArguments, load_split


@friendly
def main() -> None:
    parser = TrlParser((DataArguments, DsvllmSFTConfig, ModelConfig))
    data, args, model_args = parser.parse_args_and_config()
    train, test = load_split(data, needs_test=args.eval_strategy != "no")
    session = prepare(args, model_args)
    args.model_init_kwargs = {**session.model_init_kwargs(), **(args.model_init_kwargs or {})}
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=session.peft_config,
        quantization_config=session.quantization_config,
    )
    session.attach(trainer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
