"""Makes a tokenizer with a ChatML template, and a Llama model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from luthier.api import Facts, Stage
from luthier.artifacts.datasets import require_split
from luthier.artifacts.models import model_facts
from luthier.artifacts.rows import texts_of
from luthier_plugins.init.config import InitConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The split that llama.cpp knows as `qwen2`: words with their leading space, single digits, punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Init(Stage[InitConfig]):
    """The stage ``init``."""

    def run(self) -> Facts:
        context = self.context
        tokenizer = self._tokenizer()
        torch.manual_seed(context.seed)
        model = LlamaForCausalLM(self._model_config(tokenizer)).to(getattr(torch, self.config.dtype))
        stop: Any = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(context.out)
        tokenizer.save_pretrained(context.out)
        return model_facts(context.out)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        bpe: Any = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(self._texts(), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            eos_token=END_OF_TURN,
            pad_token=END_OF_TEXT,
            chat_template=CHATML,
            model_max_length=self.config.context_length,
        )

    def _texts(self) -> Iterator[str]:
        for dataset in self.context.artifacts(self.config.data):
            for row in require_split(dataset, "train"):
                yield from texts_of(row)

    def _model_config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        stop: Any = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        padding: Any = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            num_key_value_heads=self.config.kv_heads,
            max_position_embeddings=self.config.context_length,
            rope_parameters={"rope_type": "default", "rope_theta": self.config.rope_theta},
            tie_word_embeddings=self.config.tied,
            bos_token_id=padding,
            eos_token_id=stop,
            pad_token_id=padding,
        )
