"""Preference training with TRL's DPOTrainer: our tokens, any loss, and the reference that was meant."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from luthier.api.context import StageContext
from luthier.api.errors import DataError
from luthier.api.protocols import Facts, Message, PreferenceBatch, PreferenceLoss, Regularizer, Row
from luthier.api.training import PreferenceTrainingConfig, TrainingConfig
from luthier.artifacts.datasets import read_split, require_split
from luthier.modeling.loading import load_model, load_tokenizer, save_adapter, save_model
from luthier.modeling.text import IGNORED, encode_conversation
from luthier.training.trainer import (
    check_head,
    evaluation_arguments,
    penalties,
    quiet_libraries,
    run_trainer,
    started,
    trainer_arguments,
)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference pair as token ids; completions end with the stop token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def encode_pair(
    tokenizer: Any, prompt: list[Message], chosen: list[Message], rejected: list[Message], stop_ids: Sequence[int]
) -> EncodedPair:
    """Tokens of a pair, rendered like the conversations of supervised fine-tuning.

    Raises:
        DataError: the two answers do not share the prompt's tokens.
    """
    sides = [_completion(tokenizer, [*prompt, *answer], stop_ids) for answer in (chosen, rejected)]
    (prompt_ids, chosen_ids), (other_prompt, rejected_ids) = sides
    if prompt_ids != other_prompt:
        raise DataError("the chat template renders the prompt differently for the two answers")
    return EncodedPair(prompt_ids, chosen_ids, rejected_ids)


def _completion(tokenizer: Any, messages: list[Message], stop_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    encoded = encode_conversation(tokenizer, messages, stop_ids)
    # Only the answer counts, also where the prompt holds earlier turns of the assistant.
    last = max(place for place, label in enumerate(encoded.labels) if label != IGNORED)
    first = last
    while first > 0 and encoded.labels[first - 1] != IGNORED:
        first -= 1
    return encoded.input_ids[:first], encoded.input_ids[first : last + 1]


class PairTrainer(DPOTrainer):
    """DPOTrainer on ready tokens, with a loss that a plugin may bring."""

    def __init__(
        self,
        *args: Any,
        pair_loss: PreferenceLoss,
        pair_beta: float,
        regularizers: Sequence[Regularizer],
        **kwargs: Any,
    ) -> None:
        self.pair_loss = pair_loss
        self.pair_beta = pair_beta
        self.regularizers = regularizers
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        return None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        # The collator puts the chosen rows first, the rejected ones behind them.
        chosen, rejected = output.log_probs.sum(1).chunk(2)
        chosen_tokens, rejected_tokens = output.label_mask.sum(1).chunk(2)
        before: tuple[Any, Any] = (None, None)
        if self.pair_loss.needs_reference:
            before = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        batch = PreferenceBatch(chosen, rejected, before[0], before[1], chosen_tokens, rejected_tokens)
        logged = self._metrics["train" if model.training else "eval"]
        logged["logps/chosen"].append(float(chosen.detach().mean()))
        logged["logps/rejected"].append(float(rejected.detach().mean()))
        logged["accuracy"].append(float(_better(batch).float().mean()))
        loss = self.pair_loss.loss(batch, self.pair_beta).mean()
        return loss + penalties(self.regularizers, model) if self.regularizers and model.training else loss


def _better(batch: PreferenceBatch) -> torch.Tensor:
    margin = batch.chosen - batch.rejected
    if batch.reference_chosen is not None and batch.reference_rejected is not None:
        margin = margin - (batch.reference_chosen - batch.reference_rejected)
    return margin > 0


def train_pairs(
    model: Any,
    tokenizer: Any,
    train: Sequence[EncodedPair],
    validation: Sequence[EncodedPair],
    loss: PreferenceLoss,
    beta: float,
    config: TrainingConfig,
    context: StageContext,
) -> Facts:
    """Train on pairs; the reference is the model as it is given, its adapter included.

    TRL would read a full model's reference again from disk, and copies a PeftModel's adapter ``default``.

    Raises:
        ModelError: the model has an adapter on its output head.
    """
    check_head(model)
    quiet_libraries()
    adapted = hasattr(model, "peft_config")
    reference = None if adapted or not loss.needs_reference else copy.deepcopy(model)
    arguments = trainer_arguments(config, context) | (evaluation_arguments(config) if validation else {})
    trainer = PairTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(max_length=config.max_length, beta=beta, **arguments),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(validation) if validation else None,
        regularizers=started(config, model, context),
        processing_class=tokenizer,
        pair_loss=loss,
        pair_beta=beta,
    )
    facts = run_trainer(trainer, context)
    if adapted and "ref" in model.peft_config:
        model.delete_adapter("ref")
    return facts


def _dataset(pairs: Sequence[EncodedPair]) -> datasets.Dataset:
    return datasets.Dataset.from_list([asdict(pair) for pair in pairs])


def tune_on_pairs(loss: PreferenceLoss, beta: float, config: PreferenceTrainingConfig, context: StageContext) -> Facts:
    """The whole of a stage that trains on preference pairs: read, encode, train, save."""
    source = context.input("model")
    tokenizer = load_tokenizer(source)
    stops = source.facts["stop_token_ids"]
    data = context.input("data")

    def encoded(rows: Sequence[Row]) -> list[EncodedPair]:
        pairs = [encode_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], stops) for row in rows]
        return _short_enough(pairs, config, context)

    pairs = encoded(require_split(data, "train"))
    held_out = read_split(data, "validation")
    model = load_model(source, trainable=True)
    facts = train_pairs(model, tokenizer, pairs, encoded(held_out) if held_out else [], loss, beta, config, context)
    save = save_adapter if source.kind == "adapter" else save_model
    return {**save(model, source, context.out), "training": {**facts, "pairs": len(pairs)}}


def _short_enough(
    pairs: list[EncodedPair], config: PreferenceTrainingConfig, context: StageContext
) -> list[EncodedPair]:
    short = [pair for pair in pairs if len(pair) <= config.max_length]
    over = len(pairs) - len(short)
    if over:
        text = f"{over} of {len(pairs)} pairs are longer than max_length={config.max_length}"
        if config.on_long == "fail" or not short:
            longest = max(len(pair) for pair in pairs)
            raise DataError(text, hint=f"the longest has {longest} tokens; raise `max_length`")
        context.warn(f"{text} and were left out")
    return short
