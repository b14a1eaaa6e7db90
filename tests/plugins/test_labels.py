"""What is trained: assistant turns with their stop token, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from luthier.api import DataError
from luthier.modeling.text import IGNORED, encode_conversation
from luthier.training.encoding import packed_rows
from transformers import AutoTokenizer

SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": " Hello, you.\n"},
    {"role": "user", "content": "And <|x|>?"},
    {"role": "assistant", "content": "Yes: 123 é"},
]


@pytest.mark.parametrize(("name", "stop"), [("qwen2.5", "<|im_end|>"), ("llama-3.1", "<|eot_id|>")])
def test_only_assistant_turns_and_their_stop_token_are_trained(name: str, stop: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the real tokenizers are not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    encoded = encode_conversation(tokenizer, TALK, [tokenizer.convert_tokens_to_ids(stop)])
    trained = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    contents = [message["content"] for message in TALK if message["role"] == "assistant"]
    # Llama's template strips what is around a message's text.
    kept = [text.strip() for text in contents] if name.startswith("llama") else contents
    assert trained == "".join(text + stop for text in kept)
    assert encoded.input_ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)


def test_a_template_without_a_stop_token_is_refused() -> None:
    if not (SHARED / "qwen2.5").is_dir():
        pytest.skip("the real tokenizers are not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5")
    with pytest.raises(DataError, match="never stop"):
        encode_conversation(tokenizer, TALK, [tokenizer.convert_tokens_to_ids("<|endoftext|>")])


def test_packing_loses_no_token() -> None:
    rows = list(packed_rows([[1, 2, 3], [4], [5, 6, 7, 8]], 4, 0))
    blocks = [row.completions[0] for row in rows]
    assert [block.input_ids for block in blocks] == [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 0]]
    assert all(block.labels == block.input_ids for block in blocks)
