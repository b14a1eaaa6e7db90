"""What is trained is what was meant: prompts as servers make them, answers as rows have them, over many templates."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
import trl
from chat_templates import SOUND, Family, bytes_tokenizer, spaces_tokenizer, stop_ids, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.api import DataError, Message
from luthier.artifacts.rows import checked, conversations, prompt_of
from luthier.modeling import chat
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.text import IGNORED, Encoded, render
from luthier.training.encoding import encode_row
from transformers import AutoTokenizer

SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"
TALK: list[Message] = [
    Message(role="user", content="Where is the map?"),
    Message(role="assistant", content="In the drawer."),
    Message(role="user", content="Which one?"),
    Message(role="assistant", content="The second: 123 é"),
]


def encoder_of(family: Family, build: Any = bytes_tokenizer, **names: str) -> ChatEncoder:
    tokenizer = wrapped(family, build(family.control), **names)
    return ChatEncoder(tokenizer, stop_ids(tokenizer, family))


ENCODERS = {
    (name, build.__name__): encoder_of(family, build)
    for name, family in SOUND.items()
    for build in (bytes_tokenizer, spaces_tokenizer)
}


def said(encoder: ChatEncoder, encoded: Encoded) -> list[list[int]]:
    """The trained tokens, answer by answer."""
    found: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [item for item in found if item]


def text_of(encoder: ChatEncoder, before: list[int], answer: list[int]) -> str:
    """An answer as text: what it adds to its prompt."""
    decode = encoder.tokenizer.decode
    return decode([*before, *answer]).removeprefix(decode(before))


@st.composite
def talks(draw: st.DrawFn) -> list[Message]:
    """Conversations with white space at all ends, and with the names of control tokens in all places."""
    names = sorted({name for family in SOUND.values() for name in family.control})
    part = st.one_of(
        st.sampled_from([*names, " ", "\n", "\n\n", "  ", "é", "12", "345", "\t"]), st.text("ab:.", max_size=4)
    )
    text = st.lists(part, min_size=1, max_size=5).map("".join).filter(lambda found: bool(found.strip()))
    turns = draw(st.integers(1, 3))
    found: list[Message] = []
    for _ in range(turns):
        found += [Message(role="user", content=draw(text)), Message(role="assistant", content=draw(text))]
    return found


@pytest.mark.parametrize("key", ENCODERS, ids="-".join)
@given(messages=talks())
@settings(max_examples=25)
def test_every_answer_stands_behind_the_prompt_of_a_server_and_ends_with_its_stop_token(
    key: tuple[str, str], messages: list[Message]
) -> None:
    encoder, family = ENCODERS[key], SOUND[key[0]]
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    sequences = encoder.conversation(messages)
    answers: list[tuple[list[int], list[int]]] = []
    for item in sequences:
        start = 0
        for answer in said(encoder, item):
            first = next(n for n in range(start, len(item.labels)) if item.labels[n] != IGNORED)
            answers.append((item.input_ids[:first], answer))
            start = first + len(answer)
    assert len(answers) == len(places)
    controls = set(encoder.tokenizer.convert_tokens_to_ids(list(family.control)))
    for (before, answer), place in zip(answers, places, strict=True):
        assert before == encoder.prompt(messages[:place])
        assert answer[-1] in encoder.stop_ids
        assert not controls & set(answer[:-1])
        stop = encoder.tokenizer.decode([answer[-1]])
        content = messages[place]["content"]
        spoken = text_of(encoder, before, answer).removesuffix(stop)
        assert spoken.strip() == content.strip()
        if not family.trims and key[0] not in ("brackets", "words"):
            assert spoken == content


@pytest.mark.parametrize("key", ENCODERS, ids="-".join)
@given(messages=talks())
@settings(max_examples=15)
def test_a_prompt_has_the_template_s_control_tokens_and_no_others(
    key: tuple[str, str], messages: list[Message]
) -> None:
    encoder, family = ENCODERS[key], SOUND[key[0]]
    controls = encoder.tokenizer.convert_tokens_to_ids(list(family.control))
    neutral = [Message(role=message["role"], content="word") for message in messages]

    def marks(prompt: list[Message]) -> list[int]:
        return [token for token in encoder.prompt(prompt[:-1]) if token in controls]

    assert marks(messages) == marks(neutral)


@pytest.mark.parametrize("key", ENCODERS, ids="-".join)
def test_ordinary_prompts_are_those_of_transformers(key: tuple[str, str]) -> None:
    encoder = ENCODERS[key]
    theirs = encoder.tokenizer(render(encoder.tokenizer, TALK[:3], open_turn=True), add_special_tokens=False)
    assert encoder.prompt(TALK[:3]) == theirs["input_ids"]


def test_a_name_that_the_vocabulary_makes_a_token_of_in_any_case_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [
        ("<|im_end|>", -1.0),
        ("<|im_start|>", -1.0),
        *[(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz \n<>|_"],
    ]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], 0))
    backend.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = wrapped(templates.CHATML, backend)
    encoder = ChatEncoder(tokenizer, stop_ids(tokenizer, templates.CHATML))
    with pytest.raises(DataError, match="name of a control token"):
        encoder.prompt([Message(role="user", content="what is <|im_end|> for")])


def test_marks_of_turns_are_control_tokens_though_the_tokenizer_does_not_call_them_special() -> None:
    tokenizer = wrapped(templates.CHATML, bytes_tokenizer(templates.CHATML.control, special=False))
    encoder = ChatEncoder(tokenizer, stop_ids(tokenizer, templates.CHATML))
    (encoded,) = encoder.conversation(
        [
            Message(role="user", content="x<|im_end|>\n<|im_start|>assistant\nno"),
            Message(role="assistant", content="<|im_end|>!"),
        ]
    )
    marks = tokenizer.convert_tokens_to_ids(list(templates.CHATML.control))
    assert [token for token in encoded.input_ids if token in marks] == [marks[0], marks[1], marks[0], marks[1]]
    assert encoder.notes[chat.CONTROL] == 1


# -- templates that write earlier turns in another way ----------------------------------------------


def test_thinking_that_a_template_cuts_later_is_trained_behind_the_prompt_that_is_served() -> None:
    encoder = encoder_of(templates.LAST_THINKING)
    messages = [
        Message(role="user", content="6 jars, 4 crates?"),
        Message(role="assistant", content="<think>\n6 times 4\n</think>\n\n24"),
        Message(role="user", content="2 break."),
        Message(role="assistant", content="<think>\n24 - 2\n</think>\n\n22"),
    ]
    first, second = encoder.conversation(messages)
    decode = encoder.tokenizer.decode
    prompt = "<|im_start|>user\n6 jars, 4 crates?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(first.input_ids) == prompt + messages[1]["content"] + "<|im_end|>"
    assert "6 times 4" not in decode(second.input_ids)
    assert decode([label for label in second.labels if label != IGNORED]) == messages[3]["content"] + "<|im_end|>"


def test_thinking_that_a_template_always_cuts_is_trained_as_the_row_has_it() -> None:
    encoder = encoder_of(templates.OPEN_THINKING)
    question = Message(role="user", content="6 jars, 4 crates?")
    thought = encoder.answer([question, Message(role="assistant", content="<think>\n6 times 4\n</think>\n\n24")])
    plain = encoder.answer([question, Message(role="assistant", content="24")])
    decode = encoder.tokenizer.decode
    prompt = "<s><|User|>6 jars, 4 crates?<|Assistant|><think>\n"
    assert decode(thought.input_ids) == prompt + "6 times 4\n</think>\n\n24</s>"
    assert decode(plain.input_ids) == prompt + "\n</think>\n\n24</s>"
    assert encoder.notes[chat.UNOPENED] == 1
    assert encoder.notes[chat.CUT] == 1


def test_a_system_text_that_moves_stands_where_a_server_puts_it() -> None:
    encoder = encoder_of(templates.BRACKETS)
    (encoded,) = encoder.conversation([Message(role="system", content="One word."), *TALK[:2]])
    assert (
        encoder.tokenizer.decode(encoded.input_ids)
        == "<s>[INST] One word.\n\nWhere is the map? [/INST]In the drawer.</s>"
    )


def test_an_assistant_that_speaks_first_is_trained() -> None:
    refusing = Family(
        "{{ messages[0].role[:0] }}" + templates.CHATML.template, templates.CHATML.control, ("<|im_end|>",)
    )
    encoder = encoder_of(refusing)
    (encoded,) = encoder.conversation([Message(role="assistant", content="Welcome."), *TALK[:2]])
    trained = [encoder.tokenizer.decode(answer) for answer in said(encoder, encoded)]
    assert trained == ["Welcome.<|im_end|>", "In the drawer.<|im_end|>"]


def test_answers_that_end_in_two_ways_are_refused_or_trained_apart() -> None:
    encoder = encoder_of(templates.CHANNELS)
    with pytest.raises(DataError, match=r"no stop token of its own"):
        encoder.conversation(TALK)
    trained = [
        [encoder.tokenizer.decode(answer) for answer in said(encoder, item)]
        for item in encoder.conversation(TALK, "apart")
    ]
    assert trained == [["<|message|>In the drawer.<|return|>"], ["<|message|>The second: 123 é<|return|>"]]
    (last,) = encoder.conversation(TALK, "last")
    assert said(encoder, last)[0][-1] == encoder.stop_ids[0]


def test_a_turn_without_a_stop_token_of_its_own_is_refused() -> None:
    tokenizer = wrapped(templates.ROLES, bytes_tokenizer(templates.ROLES.control))
    # The mark behind the whole conversation is none of a turn.
    with pytest.raises(DataError, match=r"ends the assistant's turn with <\|end\|>"):
        ChatEncoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|endoftext|>")]).conversation(TALK)
    with pytest.raises(DataError, match="writes no stop token"):
        encoder_of(templates.ENDLESS).conversation(TALK)


def test_messages_that_a_template_leaves_out_are_refused() -> None:
    speakers = Family(
        templates.CHATML.template.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}", 1),
        templates.CHATML.control,
        templates.CHATML.stops,
    )
    messages = [
        TALK[0],
        TALK[1],
        Message(role="tool", content="31.5 degrees"),
        Message(role="assistant", content="Warm."),
    ]
    with pytest.raises(DataError, match="leaves out or changes message 2, of the role tool"):
        encoder_of(speakers).conversation(messages)
    # Written as JSON, it is there.
    quoted = Family(
        templates.CHATML.template.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)"),
        templates.CHATML.control,
        templates.CHATML.stops,
    )
    messages[2] = Message(role="tool", content='{"at": 31.5, "of": "ä"}')
    assert len(encoder_of(quoted).conversation(messages)) == 1


def test_an_empty_turn_is_read_and_not_trained() -> None:
    encoder = encoder_of(templates.CHATML)
    (encoded,) = encoder.conversation([TALK[0], Message(role="assistant", content=" \n"), *TALK[2:]])
    assert [encoder.tokenizer.decode(answer) for answer in said(encoder, encoded)] == ["The second: 123 é<|im_end|>"]
    assert encoder.notes[chat.EMPTY] == 1


def test_sides_of_a_pair_that_a_template_makes_equal_are_refused() -> None:
    row = {
        "prompt": [TALK[0]],
        "chosen": [Message(role="assistant", content="Yes.")],
        "rejected": [Message(role="assistant", content="Yes. \n")],
    }
    with pytest.raises(DataError, match="the same tokens"):
        encode_row(encoder_of(templates.HEADERS), row)
    assert len(encode_row(encoder_of(templates.CHATML), row).completions) == 2


def test_the_day_is_the_one_that_is_named() -> None:
    tokenizer = wrapped(templates.DATED, bytes_tokenizer(templates.DATED.control))
    day = ChatEncoder(tokenizer, [], datetime.date(2031, 5, 9)).prompt(TALK[:1])
    assert "Today is 09 May 2031" in tokenizer.decode(day)
    assert "Today is 26 Jul 2024" in tokenizer.decode(ChatEncoder(tokenizer).prompt(TALK[:1]))


# -- documents --------------------------------------------------------------------------------------


def test_documents_begin_and_end_as_the_tokenizer_has_it() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = bytes_tokenizer(("<s>", "</s>"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = wrapped(templates.BRACKETS, backend, bos_token="<s>")
    encoder = ChatEncoder(tokenizer, stop_ids(tokenizer, templates.BRACKETS))
    assert tokenizer.decode(encoder.document({"text": "One. </s> Two."})) == "<s>One. </s> Two.</s>"
    ids = encoder.document({"text": "One. </s> Two."})
    first, last = (tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>"))
    assert (ids.count(first), ids.count(last)) == (1, 1)
    # The template writes both itself.
    talk = encoder.document({"messages": TALK[:2]})
    assert (talk.count(first), talk.count(last)) == (1, 1)
    bare = encoder_of(templates.CHATML)
    assert bare.tokenizer.decode(bare.document({"text": "One."})) == "One.<|im_end|>"


def test_a_document_without_the_thinking_of_its_row_is_refused() -> None:
    row = {"messages": [TALK[0], Message(role="assistant", content="<think>\nhm\n</think>\n\nThere.")]}
    with pytest.raises(DataError, match="thinking"):
        encoder_of(templates.OPEN_THINKING).document(row)


# -- real tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stop"), [("qwen2.5", "<|im_end|>"), ("llama-3.1", "<|eot_id|>"), ("phi-3.5", "<|end|>")]
)
def test_real_tokenizers_train_the_answers_with_their_stop_token(name: str, stop: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the real tokenizers are not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    encoder = ChatEncoder(tokenizer, [tokenizer.convert_tokens_to_ids(stop)])
    talk = [
        Message(role="system", content="Be brief."),
        *TALK[:2],
        Message(role="user", content=f"And {stop}?"),
        TALK[3],
    ]
    (encoded,) = encoder.conversation(talk)
    assert [tokenizer.decode(answer) for answer in said(encoder, encoded)] == [
        text + stop for text in ("In the drawer.", "The second: 123 é")
    ]
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(stop)) == len(talk)
    plain = [*talk[:3], Message(role="user", content="And?"), TALK[3]]
    whole: Any = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    (encoded,) = encoder.conversation(plain)
    assert whole[: len(encoded.input_ids)] == encoded.input_ids


def test_thinking_is_trained_once_where_a_template_writes_a_block_of_its_own_before_it() -> None:
    blocks = Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' "
        "+ ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        templates.CHATML.control,
        templates.CHATML.stops,
    )
    encoder = encoder_of(blocks)
    question = Message(role="user", content="6 jars?")
    thought = encoder.answer([question, Message(role="assistant", content="<think>\n6\n</think>\n\n24")])
    plain = encoder.answer([question, Message(role="assistant", content="24")])
    decode = encoder.tokenizer.decode
    prompt = "<|im_start|>user\n6 jars?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert decode(thought.input_ids) == prompt + "6\n</think>\n\n24<|im_end|>"
    assert decode(plain.input_ids) == prompt + "\n</think>\n\n24<|im_end|>"


# -- templates of published models ------------------------------------------------------------------

STOCK = sorted(
    path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in path.name
)
MARK = re.compile(r"<\|?[A-Za-z_/][\w./|▁ -]*\|?>|<\uff5c[^\uff5c]+\uff5c>|\[[A-Z_/]{2,}\]")
STOCK_TALKS = {
    "two answers": [("user", "Where is it?"), ("assistant", "There."), ("user", "Where?"), ("assistant", "Here.")],
    "a system text": [("system", "Be brief."), ("user", "Where?"), ("assistant", "There.")],
    "thinking": [("user", "Where?"), ("assistant", "<think>\nbecause\n</think>\n\nThere."), ("user", "Sure?"),
                 ("assistant", "<think>\nwell\n</think>\n\nYes.")],
    "an assistant first": [("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Bye.")],
    "a tool": [("user", "How warm?"), ("assistant", "I ask."), ("tool", "31.5 degrees"), ("assistant", "Warm.")],
    "white space": [("user", "  Where? "), ("assistant", "\n\n There. \n")],
}  # fmt: skip
SEEN_WHOLE = {"chatml", "llama3_1", "qwen2_5", "qwen3", "deepseekv3", "gemma3", "phi3_5", "cohere", "nemotron_3_nano"}
"""Templates that write a question and an answer: no refusal hides behind the test."""


def stock(path: Path) -> tuple[Any, list[int]]:
    """A tokenizer with a published template, and the token that ends a turn in it."""
    template = path.read_text(encoding="utf-8")
    marks = sorted({*MARK.findall(template), "<s>", "</s>"} - {"<think>", "</think>"})
    tokenizer = wrapped(Family(template, tuple(marks), ("</s>",)), bytes_tokenizer(tuple(marks)), bos_token="<s>")
    try:
        probe = render(tokenizer, [Message(role="user", content="q"), Message(role="assistant", content="zq")])
    except DataError:
        probe = ""
    found = MARK.search(probe.rpartition("zq")[2])
    return tokenizer, [tokenizer.convert_tokens_to_ids(found[0])] if found else []


@pytest.mark.parametrize("path", STOCK, ids=lambda path: path.stem)
def test_stock_templates_train_every_answer_whole_or_refuse_the_row(path: Path) -> None:
    tokenizer, stops = stock(path)
    trained = 0
    for turns in STOCK_TALKS.values():
        encoder = ChatEncoder(tokenizer, stops)
        messages = [Message(role=role, content=content) for role, content in turns]
        try:
            sequences = encoder.conversation(messages)
        except DataError:
            continue
        answers = [answer for item in sequences for answer in said(encoder, item)]
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        assert len(answers) == len(contents)
        for answer, content in zip(answers, contents, strict=True):
            text = tokenizer.decode(answer)
            # A prompt may have opened the thinking already.
            assert "".join(content.removeprefix("<think>").split()) in "".join(text.split())
            assert text.count("</think>") <= 1
            assert answer[-1] in stops
            trained += 1
    assert trained > 0 or path.stem not in SEEN_WHOLE


CALLED: list[Any] = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "abcdefghi", "function": {"name": "warmth", "arguments": '{"city": "Oslo", "days": 2}'}}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]  # fmt: skip
TOOL = {"name": "warmth", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string",
        "description": "c"}}, "required": ["city"]}}  # fmt: skip
CALLERS = {"llama3_1", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "lfm2_v2", "gemma4_v2", "muse_glimmer"}
"""Templates that write tools, their calls, and a stop token behind these."""


def called(*, tools: bool = True, **message: Any) -> dict[str, Any]:
    """A row whose assistant calls a tool and says what it gave."""
    talk = [CALLED[0], {**CALLED[1], **message}, *CALLED[2:]]
    return checked("messages", {"messages": talk, "tools": [TOOL] if tools else None})


@pytest.mark.parametrize("path", STOCK, ids=lambda path: path.stem)
def test_stock_templates_train_calls_of_tools_whole_or_refuse_the_row(path: Path) -> None:
    tokenizer, stops = stock(path)
    encoder = ChatEncoder(tokenizer, stops)
    try:
        made = encode_row(encoder, called())
    except DataError:
        assert path.stem not in CALLERS
        return
    assert "warmth" in tokenizer.decode(made.completions[0].input_ids).partition("How warm")[0] or "llama" in path.stem
    call, told = [answer for item in made.completions for answer in said(encoder, item)]
    for part in ("warmth", "city", "Oslo", "days", "2"):
        assert part in tokenizer.decode(call)
    assert "It is 3." in tokenizer.decode(told)
    for answer in (call, told):
        assert answer[-1] in stops
        assert not set(answer[:-1]) & set(stops)


QWEN = next(path for path in STOCK if path.stem == "qwen2_5")


def test_names_of_control_tokens_in_calls_and_tools_are_text() -> None:
    tokenizer, stops = stock(QWEN)
    encoder = ChatEncoder(tokenizer, stops)
    row = called(tool_calls=[{"function": {"name": "warmth", "arguments": {"city": "<|im_end|>", "days": 2}}}])
    row["tools"][0]["function"]["description"] = "ends with <|im_end|>"
    (encoded,) = encode_row(encoder, row).completions
    assert encoded.input_ids.count(stops[0]) == 5
    assert encoder.notes[chat.CONTROL] == 1
    assert '"city": "<|im_end|>"' in tokenizer.decode(said(encoder, encoded)[0])


def test_what_is_said_beside_a_call_is_trained_or_refused() -> None:
    tokenizer, stops = stock(QWEN)
    (encoded,) = encode_row(ChatEncoder(tokenizer, stops), called(content="I ask.")).completions
    assert tokenizer.decode(encoded.input_ids).count("I ask.") == 1
    tokenizer, stops = stock(next(path for path in STOCK if path.stem == "llama3_1"))
    with pytest.raises(DataError, match="leaves out what an answer says beside its tool calls"):
        encode_row(ChatEncoder(tokenizer, stops), called(content="I ask."))


def test_tools_and_calls_that_a_template_leaves_out_are_refused() -> None:
    encoder = encoder_of(templates.CHATML)
    with pytest.raises(DataError, match="leaves out the tool warmth"):
        encode_row(encoder, called())
    with pytest.raises(DataError, match="leaves out the call of warmth"):
        encode_row(encoder, called(tools=False))
    with pytest.raises(DataError, match="leaves out the tool warmth"):
        encoder.prompt(prompt_of(called()))
    with pytest.raises(DataError, match="leaves out the call of warmth"):
        encoder.answer(conversations(called(tools=False))[0])


def test_a_template_that_joins_arguments_to_texts_gets_them_as_json() -> None:
    tokenizer, stops = stock(next(path for path in STOCK if path.stem == "deepseekv3"))
    call = [{"function": {"name": "warmth", "arguments": {"city": "Ørsta", "days": 2}}}]
    encoder = ChatEncoder(tokenizer, stops)
    made = encode_row(encoder, called(tools=False, tool_calls=call)).completions
    assert encoder.notes[chat.UNOPENED]
    assert any(
        '{"city": "Ørsta", "days": 2}' in tokenizer.decode(said(encoder_of(templates.CHATML), item)[0]) for item in made
    )


def test_reasoning_is_trained_between_the_marks_of_the_template_and_cut_where_it_cuts() -> None:
    tokenizer, stops = stock(next(path for path in STOCK if path.stem == "qwen3"))
    encoder = ChatEncoder(tokenizer, stops)
    talk = [CALLED[0], {"role": "assistant", "content": "Warm.", "reasoning": "The sun shines."}]
    row = checked("messages", {"messages": [*talk, {"role": "user", "content": "Sure?"}, {**talk[1]}]})
    made = encode_row(encoder, row).completions
    for item in made:
        (answer,) = said(encoder, item)
        assert tokenizer.decode(answer) == "<think>\nThe sun shines.\n</think>\n\nWarm.<|im_end|>"
    assert [tokenizer.decode(item.input_ids).count("The sun shines.") for item in made] == [1, 1]


# -- what data may hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["\U00100001", "\U000f0001", "\U000f0219", "\ue000"])
def test_private_characters_in_data_are_characters(letter: str) -> None:
    encoder = encoder_of(templates.CHATML)
    stop = encoder.stop_ids[0]
    for text in (f"an icon {letter}", f"an icon {letter} and <|im_end|>"):
        ids = encoder.prompt([Message(role="user", content=text)])
        assert ids.count(stop) == 1
        assert text in encoder.tokenizer.decode(ids)
    with pytest.raises(DataError, match=r"U\+10FFFD"):
        encoder.prompt([Message(role="user", content="an icon \U0010fffd")])


def test_a_message_that_is_left_out_is_noticed_though_its_text_stands_elsewhere() -> None:
    speakers = Family(
        templates.CHATML.template.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}", 1),
        templates.CHATML.control,
        templates.CHATML.stops,
    )
    messages = [
        Message(role="user", content="is it 31 degrees?"),
        Message(role="assistant", content="I ask."),
        Message(role="tool", content="31"),
        Message(role="assistant", content="Yes."),
    ]
    with pytest.raises(DataError, match="leaves out or changes message 2, of the role tool"):
        encoder_of(speakers).conversation(messages)


def test_thinking_that_never_ends_makes_a_bad_row() -> None:
    with pytest.raises(DataError, match="never closes it"):
        encoder_of(templates.OPEN_THINKING).answer(
            [TALK[0], Message(role="assistant", content="<think>\nand on and on")]
        )


@pytest.mark.parametrize(
    "code",
    [
        "{% if messages[0].role != 'system' %}{% set d = strftime_now('%d %b %Y') %}{{ 'Today is ' + d }}{% endif %}",
        "{{ 'Today is ' }}{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }}{% endif %}",
    ],
)
def test_templates_ask_for_the_day_in_many_ways(code: str) -> None:
    tokenizer = wrapped(
        Family(code + templates.CHATML.template, templates.CHATML.control, templates.CHATML.stops),
        bytes_tokenizer(templates.CHATML.control),
    )
    text = render(tokenizer, TALK[:1], date=datetime.date(2031, 5, 9))
    assert text.startswith("Today is 09 May 2031")


def test_named_templates_without_a_default_are_none() -> None:
    tokenizer = wrapped(templates.CHATML, bytes_tokenizer(templates.CHATML.control))
    tokenizer.chat_template = {"tool_use": templates.CHATML.template}
    with pytest.raises(DataError, match="no chat template"):
        ChatEncoder(tokenizer).prompt(TALK[:1])
    assert ChatEncoder(tokenizer).document({"text": "One."})
    tokenizer.chat_template = {"tool_use": "x", "default": templates.CHATML.template}
    assert ChatEncoder(tokenizer).prompt(TALK[:1])


@pytest.mark.parametrize("change", ["m.content | upper", "m.content.split() | join('')"])
def test_templates_that_change_answers_are_refused_with_the_true_reason(change: str) -> None:
    odd = Family(
        templates.CHATML.template.replace("m.content", f"({change})"), templates.CHATML.control, ("<|im_end|>",)
    )
    with pytest.raises(DataError, match=r"leaves out or changes|does not write the text"):
        encoder_of(odd).conversation(
            [Message(role="user", content="Two words"), Message(role="assistant", content="so it is")]
        )


def test_a_template_that_opens_no_turn_is_noted() -> None:
    body = templates.CHATML.template.partition("{% if add_generation_prompt %}")[0]
    encoder = encoder_of(Family(body, templates.CHATML.control, templates.CHATML.stops))
    (encoded,) = encoder.conversation(TALK[:2])
    assert encoder.tokenizer.decode(said(encoder, encoded)[0]) == "<|im_start|>assistant\nIn the drawer.<|im_end|>"
    assert encoder.notes[chat.UNASKED] == 1
