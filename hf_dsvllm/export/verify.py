"""Does the exported model say what the trained one said?  Logits of both on the same prompts, in fp32.

The trained model is put together the slow, plain way: transformers loads the base (taken through 4 bit if the run was
QLoRA), PEFT loads the adapter.  Both forwards run in fp32, so what is left is the one rounding of the merged weights.
The prompts are fixed texts, and questions in the training chat template with the trained model's greedy answers.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.hardware import free_ram_bytes
from hf_dsvllm.tensors.fourbit import quantised_weights, round_trip
from hf_dsvllm.tensors.weights import TensorSource

__all__ = [
    "ANSWER_TOKENS",
    "GREEDY_LIMIT",
    "Answer",
    "Comparison",
    "Verification",
    "adapter_reference",
    "compare_logits",
    "full_reference",
    "partitioned_reference",
    "verification_device",
]

# Mean |difference| allowed, as a share of the reference logits' standard deviation.  Rounding weights to bf16 (8
# significant bits) moves SmolLM2-135M's logits by 0.003 of their spread (measured); another base by a tenth and up.
MEAN_LIMIT = {torch.bfloat16: 0.03, torch.float16: 0.003, torch.float32: 1e-4}
# How much of the adapter's effect on the logits must be in the export: 0 for a lost delta, 2 for one applied twice.
SHARE_SLACK = 0.2
# A token counts as different only if the reference itself preferred its own by more than this share of the spread.
TIE_SHARE = 0.1
# A few of some hundred tokens may flip: SmolLM2-135M trained at a high rate agreed on 99.1 %.
GREEDY_LIMIT = 0.97
MAX_TOKENS = 48
ANSWER_TOKENS = 16
# A log-probability is a logit less the log-sum-exp of all: twice the logits' error at most, if those are alike.
LOGPROB_FACTOR = 2

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Order 4411: two boxes of tea for Maria, to be delivered on 3 May.",
    "Once upon a time there was a small lighthouse keeper who",
    '{"name": "Ada", "born": 1815, "field": ',
    "Question: What is 17 + 25?\nAnswer:",
    "La lune brille sur la mer et",
    "Translate to German: Good morning, how are you today?",
)
QUESTIONS = (
    "What is the capital of Norway?",
    "Write one sentence about the sea.",
    "Extract the year: The bridge was opened in 1932.",
    "Answer yes or no: is 17 a prime number?",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Logits of the trained and the exported model side by side, over `tokens` positions of `prompts` texts.

    `chat_prompts` of them went through the chat template; `answer_agreement` is the share of the trained model's own
    greedy answers that the export would give too.  Log-probabilities are of the tokens that follow in the texts.
    """

    prompts: int
    tokens: int
    device: str
    mean_abs_difference: float
    max_abs_difference: float
    reference_std: float
    greedy_agreement: float
    mean_limit: float
    greedy_limit: float
    chat_prompts: int = 0
    answer_agreement: float | None = None
    mean_logprob_difference: float | None = None
    adapter_effect: float | None = None
    adapter_share: float | None = None

    @property
    def passed(self) -> bool:
        """Whether mean difference, greedy agreement and the adapter's share keep their stated limits.

        The share counts only where the adapter's effect stands out of the rounding (half the mean limit and more).
        """
        close = self.mean_abs_difference <= self.mean_limit and self.greedy_agreement >= self.greedy_limit
        if self.answer_agreement is not None:
            close = close and self.answer_agreement >= self.greedy_limit
        if self.mean_logprob_difference is not None:
            close = close and self.mean_logprob_difference <= LOGPROB_FACTOR * self.mean_limit
        if self.adapter_effect is None or self.adapter_share is None or self.adapter_effect < self.mean_limit / 2:
            return close
        return close and abs(self.adapter_share - 1) <= SHARE_SLACK


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A question's token ids, the trained model's greedy `tokens`, and for each those that are as good up to a tie."""

    question: tuple[int, ...]
    tokens: tuple[int, ...]
    ties: tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The figures, and what they were taken on: token ids of each text, and the trained model's log-probabilities."""

    verification: Verification
    texts: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    answers: tuple[Answer, ...]


def verification_device(
    parameters: int, vocab_size: int, *, through_host: bool = False
) -> tuple[Literal["cuda", "cpu"], str | None]:
    """Where one fp32 model with four sets of logits fits: the GPU, else the CPU, else a reason why nowhere.

    `through_host`: the model is put together in host memory, wherever it runs then.
    """
    logits = 4 * 4 * (len(PROMPTS) + len(QUESTIONS)) * (MAX_TOKENS + ANSWER_TOKENS) * vocab_size
    needed = int(4 * parameters * 1.25) + logits
    free = free_ram_bytes()
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= needed and (not through_host or needed <= free):
        return "cuda", None
    if needed <= free:
        return "cpu", None
    return "cpu", f"comparing logits needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"


def adapter_reference(
    base: Path,
    adapter: Path,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None,
    vocab_size: int | None,
    device: str = "cpu",
) -> Any:
    """The trained model: `base` loaded in `dtype`, through 4 bit where the run was, the adapter by PEFT, then fp32.

    `vocab_size` resizes the embeddings first, as the training script did when it added tokens.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **_placed(device))
    if quantization is not None:
        for name in quantised_weights(base, quantization):
            parameter = model.get_parameter(name)
            parameter.data = round_trip(parameter.data, quantization)
    model = model.float()
    if vocab_size is not None and vocab_size != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


def full_reference(folder: Path, device: str = "cpu") -> Any:
    """A fully trained model as it was saved, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **_placed(device))


def partitioned_reference(config_dir: Path, tensors: TensorSource, device: str = "cpu") -> Any:
    """The model of a ZeRO checkpoint, its parameters put into place one by one, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_dir), dtype=torch.float32)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name in tensors.names:
        if name not in own:
            raise ExportError(f"The checkpoint has {name}, which the model of {config_dir}/config.json has not.")
        with torch.no_grad():
            own[name].copy_(tensors.get(name))
    tied = model.all_tied_weights_keys
    lost = [name for name, _ in model.named_parameters() if name not in tensors and name not in tied]
    lost = [name for name in lost if not any(origin == name and copy in tensors for copy, origin in tied.items())]
    if lost:
        raise ExportError(f"The checkpoint lacks {len(lost)} parameters of the model, such as {lost[0]}.")
    return model.to(device)


def compare_logits(
    build_reference: Callable[[], Any],
    export: Path,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    enforce: bool = True,
    build_export: Callable[[], Any] | None = None,
) -> Comparison:
    """Run both models over the sample prompts, one after the other; `export` is loaded by transformers, or built.

    Raises ExportError if a limit is not kept, unless `enforce` is false (the difference itself is what is asked for).
    """
    reference = build_reference().eval()
    texts, answered = _texts(export, reference)
    expected = _logits(reference, texts)
    untrained = None
    if hasattr(reference, "disable_adapter"):
        with reference.disable_adapter():
            untrained = _logits(reference, texts)
    del reference
    gc.collect()
    exported = _load_export(export, device) if build_export is None else build_export()
    actual = _logits(exported.eval(), texts)
    result = _measure(expected, actual, texts, answered, dtype, device=device, untrained=untrained)
    if enforce and not result.passed:
        raise ExportError(
            "The exported model differs from the trained one: mean |logit difference| "
            f"{result.mean_abs_difference:.4g} (allowed {result.mean_limit:.4g}), greedy agreement "
            f"{result.greedy_agreement:.1%} (at least {result.greedy_limit:.0%}), share of the adapter's effect "
            f"{result.adapter_share} (1 +- {SHARE_SLACK}). Either the base is not the one trained on (--base), or this "
            "is a bug worth reporting with run.json."
        )
    logprobs = [_next_logprobs(logits, ids) for logits, ids in zip(_split(expected, texts), texts, strict=True)]
    return Comparison(
        verification=result,
        texts=tuple(tuple(ids[0].tolist()) for ids in texts),
        logprobs=tuple(tuple(each.tolist()) for each in logprobs),
        answers=tuple(_answers(expected, texts, answered, TIE_SHARE * result.reference_std)),
    )


def _answers(expected: torch.Tensor, texts: list[torch.Tensor], answered: list[int], tie: float) -> Iterator[Answer]:
    """The answers among `texts`, each of which begins where `answered` says."""
    for rows, ids, begin in zip(_split(expected, texts), texts, answered, strict=True):
        chosen = rows[begin - 1 : -1]
        if len(chosen):
            near = chosen >= chosen.max(dim=-1, keepdim=True).values - tie
            yield Answer(
                question=tuple(ids[0, :begin].tolist()),
                tokens=tuple(ids[0, begin:].tolist()),
                ties=tuple(frozenset(row.nonzero().flatten().tolist()) for row in near),
            )


def _measure(
    expected: torch.Tensor,
    actual: torch.Tensor,
    texts: list[torch.Tensor],
    answered: list[int],
    dtype: torch.dtype,
    *,
    device: str,
    untrained: torch.Tensor | None,
) -> Verification:
    """All logits [tokens of all texts, vocabulary]; `answered` is where the answer in a text begins (its end: none).

    `share` is the regression of the export's change on the trained model's change.
    """
    if expected.shape != actual.shape:
        raise ExportError(f"Logits have shape {tuple(actual.shape)}, the trained model's {tuple(expected.shape)}.")
    difference = (actual - expected).abs()
    spread = float(expected.std())
    effect = share = None
    if untrained is not None:
        change = expected - untrained
        effect = float(change.abs().mean())
        share = float(((actual - untrained) * change).sum() / change.square().sum()) if effect else None
    lost = expected.max(dim=-1).values - expected.gather(-1, actual.argmax(dim=-1, keepdim=True)).squeeze(-1)
    agrees = (lost <= TIE_SHARE * spread).float()
    answers = [rows[begin - 1 : -1] for rows, begin in zip(_split(agrees, texts), answered, strict=True)]
    answer = torch.cat([rows for rows, ids, begin in zip(answers, texts, answered, strict=True) if begin < ids.shape[1]]
                       or [torch.empty(0)])  # fmt: skip
    both = [zip(_split(logits, texts), texts, strict=True) for logits in (expected, actual)]
    logprobs = [torch.cat([_next_logprobs(rows, ids) for rows, ids in pairs]) for pairs in both]
    return Verification(
        prompts=len(texts),
        tokens=expected.shape[0],
        device=device,
        mean_abs_difference=float(difference.mean()),
        max_abs_difference=float(difference.max()),
        reference_std=spread,
        greedy_agreement=float(agrees.mean()),
        mean_limit=MEAN_LIMIT[dtype] * spread,
        greedy_limit=GREEDY_LIMIT,
        adapter_effect=effect,
        adapter_share=share,
        chat_prompts=sum(begin < ids.shape[1] for ids, begin in zip(texts, answered, strict=True)),
        answer_agreement=float(answer.mean()) if answer.numel() else None,
        mean_logprob_difference=float((logprobs[0] - logprobs[1]).abs().mean()),
    )


def _split(rows: torch.Tensor, texts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """[tokens of all texts, …] -> one of [tokens, …] for each text."""
    return rows.split([ids.shape[1] for ids in texts])


def _next_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token after the first; `logits` [tokens, vocabulary], `ids` [1, tokens]."""
    return logits[:-1].log_softmax(dim=-1).gather(-1, ids[0, 1:, None]).squeeze(-1)


def _load_export(folder: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **_placed(device)
    )
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        raise ExportError(f"transformers does not load the export cleanly: {wrong}.")
    return model


def _placed(device: str) -> dict[str, Any]:
    """Arguments that load a model straight to a GPU, without a copy in host memory."""
    return {} if device == "cpu" else {"device_map": {"": device}}


def _texts(folder: Path, reference: Any) -> tuple[list[torch.Tensor], list[int]]:
    """Token ids [1, tokens] of every text by the exported tokenizer, and where the trained model's answer begins.

    Seeded random ids if the model has no tokenizer; no questions if it has no chat template.
    """
    if not (folder / "tokenizer_config.json").is_file():
        vocab_size = reference.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        random = [torch.randint(0, vocab_size, (1, MAX_TOKENS), generator=generator) for _ in PROMPTS]
        return random, [MAX_TOKENS] * len(random)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [tokenizer(text, return_tensors="pt").input_ids[:, :MAX_TOKENS] for text in PROMPTS]
    if not tokenizer.chat_template:
        return plain, [ids.shape[1] for ids in plain]
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        for question in QUESTIONS
    ]
    answered = _answered(reference, asked)
    return [*plain, *answered], [ids.shape[1] for ids in (*plain, *asked)]


@torch.inference_mode()
def _answered(model: Any, asked: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each of `asked` [1, tokens] with the model's greedy continuation; the end of the answer does not stop it.

    `generate` takes what is None from the model's own configuration (an end, a penalty on repetition): that goes too.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=0)
    for each in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
        each.generation_config = greedy
    ids, mask = _padded(asked, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    answers = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)[:, ids.shape[1] :].cpu()
    return [torch.cat([question, answer[None]], dim=1) for question, answer in zip(asked, answers, strict=True)]


@torch.inference_mode()
def _logits(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """[tokens of all texts, vocabulary] on the CPU.  One batch: the weights are read once, not for each text."""
    ids, mask = _padded(texts, left=False)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits[mask.bool().to(logits.device)].float().cpu()


def _padded(texts: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, tokens] as one batch, with the mask of what is no padding."""
    longest = max(ids.shape[1] for ids in texts)
    gaps = [longest - ids.shape[1] for ids in texts]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(ids, side) for ids, side in zip(texts, sides, strict=True)]),
        torch.cat([pad(torch.ones_like(ids), side) for ids, side in zip(texts, sides, strict=True)]),
    )
