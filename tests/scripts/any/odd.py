"""Scripts that do one thing wrong, or one thing unusual: `odd.py WHAT MODEL OUT`."""

import copy
import gc
import sys
import weakref

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

WHAT, MODEL, OUT = sys.argv[1:]
ROWS = [{"input_ids": (row := [4 + (s + k) % 300 for k in range(32)]), "labels": row} for s in range(16)]


def arguments(**more):
    return TrainingArguments(
        OUT, max_steps=2, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, **more,
    )  # fmt: skip


def train(model, args, data=ROWS, **more):
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator, **more)
    trainer.train()
    return trainer


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def made_whole_first():
    model = LlamaForCausalLM(AutoConfig.from_pretrained(MODEL))
    train(model, arguments())


def only_arguments():
    arguments()


def own_optimizer():
    args, model = arguments(), load()
    train(model, args, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None))


def no_callbacks():
    args = arguments()
    trainer = Trainer(model=load(), args=args, train_dataset=ROWS, data_collator=default_data_collator)
    trainer.callback_handler.callbacks.clear()
    trainer.train()


def catches_everything():
    try:
        own_optimizer()
    except Exception as error:
        print("went on after", type(error).__name__)


def own_quantisation():
    args = arguments()
    model = LlamaForCausalLM(AutoConfig.from_pretrained(MODEL))
    train(model, args)


def classifier():
    args = arguments()
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    train(model, args, data=[{"input_ids": row["input_ids"], "labels": n % 2} for n, row in enumerate(ROWS)])


def from_config():
    args = arguments()
    train(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)), args)


def second_trainer():
    args, model = arguments(), load()
    train(model, args)
    train(model, copy.deepcopy(args))


def folds():
    seen = []
    for fold in range(2):
        model = load()
        args = arguments()
        args.output_dir = f"{OUT}/fold{fold}"
        train(model, args)
        seen.append(weakref.ref(model))
        del model, args
        gc.collect()
    print("models alive:", sum(model() is not None for model in seen))


def helper_first():
    args = arguments()
    AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1)
    trainer = train(load(), args)
    print("trained:", type(trainer.model).__name__, trainer.model.peft_config["default"].modules_to_save)


def hands_everything_on():
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Mine(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    args = SFTConfig(OUT, max_steps=2, max_length=64, save_strategy="no", report_to="none", disable_tqdm=True)
    Mine(MODEL, args=args, train_dataset=Dataset.from_dict({"text": ["one two three"] * 16})).train()


def compiled():
    args = arguments(torch_compile=True, torch_compile_backend="eager")
    train(load(), args)


def saves_its_own_variable():
    args, model = arguments(), load()
    train(model, args)
    model.save_pretrained(OUT + "/mine")


def only_evaluates():
    args = arguments()
    trainer = Trainer(model=load(), args=args, eval_dataset=ROWS, data_collator=default_data_collator)
    trainer.evaluate()


def default_arguments():
    train(load(), None)


class OwnArguments(TrainingArguments):
    """Not a dataclass, with a constructor of its own."""

    def __init__(self, steps):
        super().__init__(OUT, max_steps=steps, per_device_train_batch_size=2, report_to="none", save_strategy="no")
        self.mine = "kept"


def own_arguments():
    args = OwnArguments(2)
    train(load(), args)
    assert args.mine == "kept"
    assert isinstance(args, OwnArguments)


def names_the_model():
    args = arguments()
    train(LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=MODEL), args)


class OwnLoop(Trainer):
    def train(self):
        for batch in self.get_train_dataloader():
            self.model(**batch).loss.backward()


class Before(Trainer):
    def train(self, *args, **kwargs):
        print("before training")
        return super().train(*args, **kwargs)


def own_loop():
    OwnLoop(load(), arguments(), train_dataset=ROWS, data_collator=default_data_collator).train()


def own_train_goes_on():
    Before(load(), arguments(), train_dataset=ROWS, data_collator=default_data_collator).train()


def prompt_tuning():
    from peft import PromptTuningConfig, get_peft_model

    args, model = arguments(), load()
    train(get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), args)


def adapters_by_pattern():
    from peft import LoraConfig, get_peft_model

    args, model = arguments(), load()
    train(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=r".*\.q_proj")), args)


globals()[WHAT]()
