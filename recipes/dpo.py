"""Preference tuning with TRL's DPOTrainer, any preset, and vLLM answering evaluation prompts while it trains.

    accelerate launch recipes/dpo.py --ds_preset lora_zero2 --model_name_or_path MODEL --train_file pairs.jsonl \
        --gen_eval_file eval.jsonl --output_dir runs/dpo

Data: JSONL with `prompt`, `chosen` and `rejected` (text or messages), or --dataset_name.
"""

from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser

from hf_dsvllm import friendly, prepare, with_presets
from hf_dsvllm.data import DataArguments, load_split


@friendly
def main() -> None:
    parser = TrlParser((DataArguments, with_presets(DPOConfig), ModelConfig))
    data, args, model_args = parser.parse_args_and_config()
    train, test = load_split(data, needs_test=args.eval_strategy != "no", columns=("chosen", "rejected"))
    session = prepare(args, model_args)
    args.model_init_kwargs = {**session.model_init_kwargs(), **(args.model_init_kwargs or {})}
    trainer = DPOTrainer(
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
