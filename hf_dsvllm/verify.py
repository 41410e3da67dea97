"""Does the exported model say what the trained one said?  Logits of both on the same prompts, in fp32.

The trained model is put together the slow, plain way: transformers loads the base (taken through 4 bit if the run was
QLoRA), PEFT loads the adapter.  Both forwards run in fp32, so what is left is the one rounding of the merged weights.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.fourbit import quantised_weights, round_trip

__all__ = ["Verification", "adapter_reference", "compare_logits", "full_reference", "memory_shortfall"]

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Logits of the trained and the exported model side by side, over `tokens` positions of `prompts` texts."""

    prompts: int
    tokens: int
    device: str
    mean_abs_difference: float
    max_abs_difference: float
    reference_std: float
    greedy_agreement: float
    mean_limit: float
    greedy_limit: float
    adapter_effect: float | None = None
    adapter_share: float | None = None

    @property
    def passed(self) -> bool:
        """Whether mean difference, greedy agreement and the adapter's share keep their stated limits.

        The share counts only where the adapter's effect stands out of the rounding (half the mean limit and more).
        """
        close = self.mean_abs_difference <= self.mean_limit and self.greedy_agreement >= self.greedy_limit
        if self.adapter_effect is None or self.adapter_share is None or self.adapter_effect < self.mean_limit / 2:
            return close
        return close and abs(self.adapter_share - 1) <= SHARE_SLACK


def memory_shortfall(parameters: int, vocab_size: int) -> str | None:
    """Why the comparison cannot run here, or None: one fp32 model with room for loading, four sets of logits."""
    logits = 4 * 4 * len(PROMPTS) * MAX_TOKENS * vocab_size
    needed = int(4 * parameters * 1.25) + logits
    free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"comparing logits needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"


def adapter_reference(
    base: Path,
    adapter: Path,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None,
    vocab_size: int | None,
) -> Any:
    """The trained model: `base` loaded in `dtype`, through 4 bit where the run was, the adapter by PEFT, then fp32.

    `vocab_size` resizes the embeddings first, as the training script did when it added tokens.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if quantization is not None:
        for name in quantised_weights(base, quantization):
            parameter = model.get_parameter(name)
            parameter.data = round_trip(parameter.data, quantization)
    model = model.float()
    if vocab_size is not None and vocab_size != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


def full_reference(folder: Path) -> Any:
    """A fully trained model as it was saved, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def compare_logits(build_reference: Callable[[], Any], export: Path, dtype: torch.dtype) -> Verification:
    """Run both models over the sample prompts, one after the other; raise ExportError if a limit is not kept."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = build_reference().eval().to(device)
    inputs = _inputs(export, reference.get_input_embeddings().weight.shape[0])
    expected = _logits(reference, inputs)
    untrained = None
    if hasattr(reference, "disable_adapter"):
        with reference.disable_adapter():
            untrained = _logits(reference, inputs)
    del reference
    gc.collect()
    actual = _logits(_load_export(export).eval().to(device), inputs)
    result = _measure(expected, actual, dtype, device=device, untrained=untrained)
    if not result.passed:
        raise ExportError(
            "The exported model differs from the trained one: mean |logit difference| "
            f"{result.mean_abs_difference:.4g} (allowed {result.mean_limit:.4g}), greedy agreement "
            f"{result.greedy_agreement:.1%} (at least {result.greedy_limit:.0%}), share of the adapter's effect "
            f"{result.adapter_share} (1 +- {SHARE_SLACK}). Either the base is not the one trained on (--base), or this "
            "is a bug worth reporting with run.json."
        )
    return result


def _measure(
    expected: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype, *, device: str, untrained: torch.Tensor | None
) -> Verification:
    """All [tokens, vocabulary].  `share` is the regression of the export's change on the trained model's change."""
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
    return Verification(
        prompts=len(PROMPTS),
        tokens=expected.shape[0],
        device=device,
        mean_abs_difference=float(difference.mean()),
        max_abs_difference=float(difference.max()),
        reference_std=spread,
        greedy_agreement=float((lost <= TIE_SHARE * spread).float().mean()),
        mean_limit=MEAN_LIMIT[dtype] * spread,
        greedy_limit=GREEDY_LIMIT,
        adapter_effect=effect,
        adapter_share=share,
    )


def _load_export(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        raise ExportError(f"transformers does not load the export cleanly: {wrong}.")
    return model


def _inputs(folder: Path, vocab_size: int) -> list[torch.Tensor]:
    """Token ids [1, <= MAX_TOKENS] per prompt, by the exported tokenizer; seeded random ids if the model has none."""
    if not (folder / "tokenizer_config.json").is_file():
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocab_size, (1, MAX_TOKENS), generator=generator) for _ in PROMPTS]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, return_tensors="pt").input_ids[:, :MAX_TOKENS] for text in PROMPTS]


@torch.inference_mode()
def _logits(model: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """[all tokens, vocabulary] on the CPU."""
    rows = [model(input_ids=ids.to(model.device)).logits[0].float().cpu() for ids in inputs]
    return torch.cat(rows)
