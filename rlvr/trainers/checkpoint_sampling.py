"""Samples of a checkpoint and their exact entropy, with nothing but transformers.

Row i of a checkpoint's samples is drawn with the same random numbers as row i of another's, whatever the batches: what
differs between two checkpoints is then the checkpoints, and not their luck.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from rlvr.errors import ConfigError
from rlvr.trainers.stopping import stop_token
from rlvr_kernels import logit_stats

MAX_LOGITS = 1 << 28  # elements of one forward's logits: 1 GiB in float32
CHUNK = 1024  # tokens whose statistics, several copies of their logits, are held at once


@dataclass(frozen=True, slots=True)
class Reader:
    """A checkpoint's view of the prompts, made before any model is loaded.   prompt_ids: one list per prompt."""

    path: Path
    tokenizer: Any
    prompt_ids: list[list[int]]
    stop_id: int | None


@dataclass(frozen=True, slots=True)
class Samples:
    """[N] completions, those of one prompt side by side; texts are without special tokens.

    entropy: nats, summed over the tokens of a completion.   length: tokens, the end token among them.
    truncated: bool, no end token within the limit.
    """

    texts: list[str]
    entropy: Tensor
    length: Tensor
    truncated: Tensor


def read_prompts(path: Path, prompts: Sequence[Any], stop: str | None) -> Reader:
    """Tokenize prompts (text, or messages for the chat template) the way this checkpoint does.

    Raises: ConfigError for a missing tokenizer or chat template, or a `stop` that is not one token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"CKPT={str(path)!r} has no tokenizer: copy the base model's tokenizer files there"
        ) from error
    if isinstance(prompts[0], str):
        ids = tokenizer(list(prompts))["input_ids"]
    elif tokenizer.chat_template is None:
        raise ConfigError(f"CKPT={str(path)!r} has no chat template and the prompts are messages: set chat=false")
    else:
        ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]
    return Reader(path, tokenizer, ids, None if stop is None else stop_token(tokenizer, stop))


def load_model(path: Path) -> Any:
    """The checkpoint on the GPU as it was saved, or on the CPU in float32, which is the faster and finer one there."""
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device).eval()


@torch.inference_mode()
def sample(
    model: Any, reader: Reader, *, samples: int, max_tokens: int, temperature: float, batch_size: int, seed: int
) -> Samples:
    """`samples` completions of each prompt, drawn from softmax(z / temperature), and their entropy.

    The checkpoint's own generation settings (top_p, repetition_penalty) are not used, except for its end tokens.
    """
    ends = _end_tokens(model, reader)
    pad = next(iter(ends), 0)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    rows = [ids for ids in reader.prompt_ids for _ in range(samples)]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(rows), max_tokens, generator=generator, dtype=torch.float64).to(model.device)
    completions: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        here = slice(start, start + batch_size)
        completions += _generate(model, rows[here], draws[here], temperature, ends)
    entropy = [
        completion_entropy(model, ids, completions[i * samples : (i + 1) * samples], temperature)
        for i, ids in enumerate(reader.prompt_ids)
    ]
    return Samples(
        texts=reader.tokenizer.batch_decode(completions, skip_special_tokens=True),
        entropy=torch.cat(entropy),
        length=torch.tensor([len(ids) for ids in completions]),
        truncated=torch.tensor([ids[-1] not in ends for ids in completions]),
    )


def _end_tokens(model: Any, reader: Reader) -> set[int]:
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), reader.tokenizer.eos_token_id, reader.stop_id}
    return found - {None}


class InverseCdf(LogitsProcessor):
    """Leaves the one token at which the cumulative softmax(z / temperature) passes a uniform number given beforehand.

    draws: [B, T] in [0, 1), float64, since float32 sums lose the tail of a large vocabulary.
    """

    def __init__(self, draws: Tensor, prompt_length: int, temperature: float):
        self.draws, self.prompt_length, self.temperature = draws, prompt_length, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: logits [B, V], -inf allowed. Returns 0 at the drawn token and -inf elsewhere."""
        cdf = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        draw = self.draws[:, input_ids.shape[1] - self.prompt_length, None]
        token = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _generate(
    model: Any, prompts: Sequence[list[int]], draws: Tensor, temperature: float, ends: set[int]
) -> list[list[int]]:
    """One completion per prompt, up to and with its end token."""
    rows = [torch.tensor(ids) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=0, padding_side="left").to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(model.device)
    chooser = InverseCdf(draws, ids.shape[1], temperature)
    written = model.generate(ids, attention_mask=mask, logits_processor=[chooser])[:, ids.shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in written]


@torch.inference_mode()
def completion_entropy(
    model: Any, prompt: Sequence[int], completions: Sequence[Sequence[int]], temperature: float
) -> Tensor:
    """Exact entropy of softmax(z / temperature) summed over the tokens of each completion: [N] float64, in nats.

    One forward for a few completions, padded at the end, where no token of theirs can see it.
    """
    kept = max(map(len, completions)) + 1  # logits from the end: the prompt's are used for its last token only
    keep = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    rows = max(1, MAX_LOGITS // (kept * model.config.get_text_config().vocab_size))
    sums = []
    for start in range(0, len(completions), rows):
        some = completions[start : start + rows]
        wholes = [torch.tensor([*prompt, *ids, *[0] * (kept - 1 - len(ids))]) for ids in some]
        ids = torch.stack(wholes).to(model.device)
        logits = model(input_ids=ids, use_cache=False, **keep).logits[:, -kept:]  # the first one chose the first token
        targets = ids[:, len(prompt) :]
        for row, length in enumerate(map(len, some)):
            sums.append(_entropy_sum(logits[row, :length], targets[row, :length], temperature))
    return torch.stack(sums).cpu()


def _entropy_sum(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for z, chosen in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
        entropy = logit_stats(z, chosen, temperature=temperature, want=("entropy",)).entropy
        assert entropy is not None
        total += entropy.sum(dtype=torch.float64)
    return total
