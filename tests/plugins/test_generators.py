"""Generators: real servers, one that misbehaves, and answers that are never made twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from chat_api import Reply, chat_api, completion, error
from luthier.api import Artifact, Completion, Generator, Interrupted, ModelError, Sampling, StoreError
from luthier.api.data import Conversation
from luthier.artifacts.answers import KeptAnswers, key_of
from luthier.artifacts.store import Store
from luthier.cli.clean import garbage
from luthier.registry import default_registry
from luthier.serving.asking import HOPELESS, Asker
from luthier.testing import TestContext, run_stage, tiny_model

KEY = "sk-very-secret-1234"


def made(context: TestContext, **config: Any) -> Generator[Any]:
    uses = config.pop("uses", "openai")
    return context.build(default_registry().use("generator", {"uses": uses, **config}))


def requests_of(*texts: str) -> list[list[Any]]:
    return [[{"role": "user", "content": text}] for text in texts]


def answers(
    folder: Path, texts: list[str], sampling: Sampling | None = None, context: TestContext | None = None, **config: Any
) -> list[str]:
    context = context or TestContext(folder)
    with made(context, **config) as generator:
        found = Asker(generator, context).ask(requests_of(*texts), sampling or Sampling())
        return [answer.text for group in found for answer in group]


# -- a server that misbehaves ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier_plugins.generators.openai.FIRST_PAUSE", 0.01)


def failing(first: Reply | None, times: int = 1) -> Any:
    """A server that sends something else the first times, or hangs."""
    left = {"times": times}
    lock = threading.Lock()

    def answer(request: dict[str, Any]) -> Reply | str:
        with lock:
            left["times"] -= 1
            fails = left["times"] >= 0
        if fails and first is None:
            time.sleep(1.5)
        return first if fails and first is not None else "fine"

    return answer


HTML = Reply(body=b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"})


@pytest.mark.parametrize(
    "first",
    [
        error(500, "overloaded"),
        error(503, "loading", **{"Retry-After": "0"}),
        error(429, "slow down", **{"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
        error(429, "slow down", **{"Retry-After": "soon"}),
        error(408, "too slow"),
        HTML,
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b"{}"),
        Reply(body=b"[]"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": 7}}]}'),
        Reply(body=completion("cut off").body, cut=30),
        None,
    ],
    ids=[
        "500", "503", "429-date", "429-word", "408", "html", "half", "empty", "list", "no-choices", "number", "cut",
        "hangs",
    ],
)  # fmt: skip
def test_what_may_go_well_the_next_time_is_tried_again(tmp_path: Path, first: Reply | None) -> None:
    with chat_api(failing(first, times=2)) as server:
        assert answers(tmp_path, ["a"], url=server.url, timeout=0.5) == ["fine"]
    assert len(server.requests) == 3


def test_a_server_that_says_how_long_to_wait_is_obeyed(tmp_path: Path) -> None:
    with chat_api(failing(error(429, "slow down", **{"Retry-After": "1"}))) as server:
        begin = time.monotonic()
        assert answers(tmp_path, ["a"], url=server.url) == ["fine"]
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(
    ("reply", "message", "tries"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), r"is refused: Incorrect API key provided: \*\*\*", 1),
        (error(403, "not for you"), "not for you", 1),
        (error(404, "no such model"), "answers 404: no such model", 1),
        (error(429, "wait", **{"Retry-After": "86400"}), "asks to wait 86400 s", 1),
        (error(500, "broken"), "does not answer after 3 tries: 500: broken", 3),
        (HTML, "does not answer after 3 tries: it sent no chat completion", 3),
    ],
    ids=["401", "403", "404", "tomorrow", "500", "html"],
)
def test_what_will_not_go_well_is_an_error(
    tmp_path: Path, reply: Reply, message: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_api(lambda request: reply) as server, pytest.raises(ModelError, match=message) as caught:
        answers(tmp_path, ["a"], url=server.url, model="m", retries=2)
    assert len(server.requests) == tries
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value)


def test_a_key_is_taken_from_the_named_variable_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", "mine")
    with chat_api(lambda request: "fine") as server:
        answers(tmp_path, ["a"], url=server.url, key_from="MY_KEY")
    assert server.keys == ["Bearer mine"]
    with (
        chat_api(lambda request: error(401, "who are you?")) as server,
        pytest.raises(ModelError, match=r"the key for .* is missing: who are you") as caught,
    ):
        answers(tmp_path, ["b"], url=server.url)
    assert caught.value.hint is not None
    assert "OPENAI_API_KEY" in caught.value.hint


def test_a_server_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:1/v1 cannot be reached") as caught:
        answers(tmp_path, ["a"], url="http://127.0.0.1:1", model="m")
    assert caught.value.hint == "is the server running at this address?"


def test_a_refused_request_costs_itself_and_no_other(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Reply | str:
        return error(400, "this is not allowed") if request["messages"][-1]["content"] == "bad" else "fine"

    context = TestContext(tmp_path)
    with chat_api(answer) as server, made(context, url=server.url) as generator:
        asker = Asker(generator, context)
        one, two, three = [group[0] for group in asker.ask(requests_of("a", "bad", "c"), Sampling())]
        assert (one.text, three.text) == ("fine", "fine")
        assert two == Completion("", finish_reason="refused", problem="this is not allowed")
        list(asker.ask(requests_of("a", "bad", "c"), Sampling()))
        assert sorted(server.texts) == ["a", "bad", "bad", "c"]
        with pytest.raises(ModelError, match=f"the first {HOPELESS} requests are refused: this is not allowed"):
            list(asker.ask([[{"role": "assistant", "content": str(n)}, *requests_of("bad")[0]] for n in range(50)],
                           Sampling()))  # fmt: skip
    # And those that were under way by then.
    assert len(server.requests) <= 4 + HOPELESS + 8


# -- what is sent ----------------------------------------------------------------------------------


def test_settings_reach_the_server(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    sampling = Sampling(7, 0.5, 0.9, n=2, seed=3, json_schema=schema)
    with chat_api(lambda request: str(request["seed"])) as server:
        settings = {"reasoning_effort": "low", "top_p": None}
        assert answers(tmp_path, ["a"], sampling, url=server.url, model="its", settings=settings) == ["3", "4"]
    for request in server.requests:
        assert request["model"] == "its"
        assert (request["max_tokens"], request["temperature"], request["reasoning_effort"]) == (7, 0.5, "low")
        assert "top_p" not in request
        assert request["response_format"]["json_schema"]["schema"] == schema


def test_requests_are_under_way_at_the_same_time(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=20)

    def answer(request: dict[str, Any]) -> str:
        together.wait()
        return request["messages"][-1]["content"]

    texts = [str(number) for number in range(8)]
    with chat_api(answer) as server:
        assert answers(tmp_path, texts, url=server.url, at_once=4) == texts
    assert server.most_at_once == 4


# -- answers are kept ------------------------------------------------------------------------------


def test_no_answer_is_asked_for_twice(tmp_path: Path) -> None:
    with chat_api(lambda request: request["messages"][-1]["content"].upper()) as server:
        assert answers(tmp_path, ["a", "b"], url=server.url) == ["A", "B"]
        assert answers(tmp_path, ["b", "c", "a"], url=server.url) == ["B", "C", "A"]
        assert sorted(server.texts) == ["a", "b", "c"]
        answers(tmp_path, ["a"], Sampling(temperature=1.0), url=server.url)
        answers(tmp_path, ["a"], url=server.url, settings={"stop": ["x"]})
        answers(tmp_path, ["a"], url=server.url, model="other")
        assert len(server.requests) == 6


def test_an_answer_is_on_disk_before_the_next_is_waited_for(tmp_path: Path) -> None:
    """A server that dies half way costs what was not answered."""
    context = TestContext(tmp_path)

    def answer(request: dict[str, Any]) -> Reply | str:
        return "fine" if int(request["messages"][-1]["content"]) < 5 else error(401, "no money left")

    texts = [str(number) for number in range(10)]
    with chat_api(answer) as server, pytest.raises(ModelError, match="no money left") as caught:
        answers(tmp_path, texts, context=context, url=server.url, at_once=1, model="m")
    assert caught.value.hint is not None
    assert "5 answers are kept: run again" in caught.value.hint
    lines = [line for path in tmp_path.rglob("answers/*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 5
    before = len(server.requests)
    with chat_api(lambda request: "now") as second:
        url = {"url": server.url, "model": "m", "at_once": 1}
        with made(context, **url) as generator:
            folder = Asker(generator, context)._folder
        with KeptAnswers(folder) as kept:
            assert len(kept) == 5
        assert answers(tmp_path, texts, context=context, url=second.url, model="m") == ["now"] * 10
    assert before == 6


def test_a_line_that_a_crash_cut_off_is_left_out_and_a_broken_one_is_told(tmp_path: Path) -> None:
    request = requests_of("a \ud800")[0]
    keys = [key_of(request, Sampling(), number) for number in range(2)]
    with KeptAnswers(tmp_path) as kept:
        for key in keys:
            kept.keep(key, Completion("lone \ud800", 3, "stop", prompt_tokens=2))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with KeptAnswers(tmp_path) as kept:
        assert kept.get(keys[0]) == Completion("lone \ud800", 3, "stop", prompt_tokens=2)
        assert kept.get(keys[1]) is None
        kept.keep(keys[1], Completion("again"))
    with KeptAnswers(tmp_path) as kept:
        assert kept.get(keys[1]) == Completion("again")
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(StoreError, match="a kept answer cannot be read"):
        KeptAnswers(tmp_path)


@pytest.mark.parametrize(
    ("budget", "message"),
    [({"tokens": 50}, r"the budget is spent: \d+ of 50 tokens"), ({"money": 0.0001}, "the budget is spent: 0.0001")],
)
def test_a_budget_stops_the_stage_and_counts_what_was_kept(
    tmp_path: Path, budget: dict[str, Any], message: str
) -> None:
    price = {"input": 1.0, "output": 10.0}
    texts = [str(number) for number in range(20)]
    with chat_api(lambda request: "one two") as server:
        asks = {"url": server.url, "price": price, "at_once": 1}
        for _ in range(2):
            with pytest.raises(ModelError, match=message):
                answers(tmp_path, texts, budget=budget, **asks)
            assert len(server.requests) == (5 if "tokens" in budget else 4)
        context = TestContext(tmp_path)
        answers(tmp_path, texts, context=context, **asks)
    assert len(server.requests) == 20
    assert context.messages[-1] == "20 answers: 240 tokens, cost 0.0006"


def test_a_budget_that_the_last_answer_reaches_is_enough(tmp_path: Path) -> None:
    with chat_api(lambda request: "one two") as server:
        assert answers(tmp_path, ["a", "b"], url=server.url, budget={"tokens": 24}) == ["one two"] * 2
        assert answers(tmp_path, ["a", "b"], url=server.url, budget={"tokens": 1}) == ["one two"] * 2


def test_a_budget_needs_a_server_that_counts(tmp_path: Path) -> None:
    def uncounted(request: dict[str, Any]) -> Reply:
        found = json.loads(completion("fine").body)
        del found["usage"]
        return Reply(body=json.dumps(found).encode())

    with (
        chat_api(uncounted) as server,
        pytest.raises(ModelError, match="does not say how many tokens its answers have: a budget cannot be kept"),
    ):
        answers(tmp_path, ["a", "b"], url=server.url, at_once=1, budget={"tokens": 100})


def test_answers_that_are_under_way_when_it_ends_are_kept(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=20)

    def answer(request: dict[str, Any]) -> Reply | str:
        together.wait()
        if request["messages"][-1]["content"] == "0":
            return error(401, "no more")
        time.sleep(0.3)
        return "late"

    context = TestContext(tmp_path)
    with chat_api(answer) as server, pytest.raises(ModelError, match="no more"):
        answers(tmp_path, [str(n) for n in range(9)], context=context, url=server.url, at_once=4)
    lines = [line for path in context.cache.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(server.requests) == 4
    assert len(lines) == 3


def test_every_question_is_tried_again_not_only_those_of_the_first_time(tmp_path: Path) -> None:
    seen: set[str] = set()

    def answer(request: dict[str, Any]) -> Reply | str:
        text = request["messages"][-1]["content"]
        first = text not in seen
        seen.add(text)
        return error(429, "slow down") if first else "fine"

    context = TestContext(tmp_path)
    with chat_api(answer) as server, made(context, url=server.url) as generator:
        asker = Asker(generator, context)
        for text in ("a", "b", "c"):
            assert [group[0].text for group in asker.ask(requests_of(text), Sampling())] == ["fine"]


def test_a_key_is_never_shown_whatever_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with chat_api(lambda request: "fine") as server:
        assert answers(tmp_path, ["a"], url=server.url) == ["fine"]
        assert server.keys == [f"Bearer {KEY}"]
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\nX: y")
        with pytest.raises(ModelError, match="OPENAI_API_KEY holds is no key") as caught:
            answers(tmp_path, ["b"], url=server.url, model="m", retries=1)
    assert KEY not in str(caught.value)


def test_cleaning_the_cache_leaves_what_was_paid_for(tmp_path: Path) -> None:
    context = TestContext(tmp_path)
    context.cache = Store(tmp_path).cache
    with chat_api(lambda request: "fine") as server:
        answers(tmp_path, ["a"], context=context, url=server.url)
    (context.cache / "tokens").mkdir()
    assert garbage(Store(tmp_path)) == []
    assert garbage(Store(tmp_path), cache=True) == [context.cache / "tokens"]
    assert garbage(Store(tmp_path), answers=True) == [context.cache / "answers"]


def test_calls_are_sent_as_the_protocol_has_them_and_a_call_is_no_answer(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "warm", "arguments": {"at": "Oslo"}}}
    tools = [{"type": "function", "function": {"name": "warm", "parameters": {"type": "object"}}}]
    talk = Conversation(
        [
            {"role": "user", "content": "How warm?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
        ],
        tools,
    )

    def answer(request: dict[str, Any]) -> Reply:
        found = json.loads(completion("").body)
        found["choices"][0]["message"]["tool_calls"] = request["messages"][1]["tool_calls"]
        return Reply(body=json.dumps(found).encode())

    context = TestContext(tmp_path)
    with chat_api(answer) as server, made(context, url=server.url) as generator:
        ((said,),) = Asker(generator, context).ask([talk], Sampling())
    (request,) = server.requests
    sent = request["messages"][1]["tool_calls"][0]
    assert sent["function"] == {"name": "warm", "arguments": '{"at": "Oslo"}'}
    assert request["messages"][2]["tool_call_id"] == sent["id"]
    assert request["tools"] == tools
    assert (said.finish_reason, said.problem) == ("refused", "it called a tool, of which no text can be made")


def test_who_stops_pays_for_nothing_twice(tmp_path: Path) -> None:
    """The user stops while answers are under way: they still come, and are kept."""
    asked = threading.Event()

    class Impatient(TestContext):
        def stopping(self) -> bool:
            return asked.is_set()

        def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
            if self.stopping():
                raise Interrupted("stopped on request")

    def answer(request: dict[str, Any]) -> str:
        asked.set()
        time.sleep(0.8)
        return "late"

    with chat_api(answer) as server:
        with pytest.raises(Interrupted):
            answers(tmp_path, ["a", "b", "c", "d"], context=Impatient(tmp_path), url=server.url, at_once=2)
        assert sorted(server.texts) == ["a", "b"]
        assert answers(tmp_path, ["a", "b"], url=server.url, at_once=2) == ["late", "late"]
        assert len(server.requests) == 2


# -- real programs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_model(tmp_path_factory.mktemp("store"), hidden_size=256, intermediate_size=256, layers=2, kv_heads=2)


@pytest.fixture(scope="module")
def gguf(model: Artifact) -> Path:
    format_ = {"uses": "gguf", "types": ["F16"]}
    export = run_stage(model.path.parents[1], "export", {"format": format_}, inputs={"model": model})
    return export.path / export.facts["files"]["F16"]["file"]


@pytest.fixture(scope="module")
def llama_server(gguf: Path) -> Iterator[str]:
    from luthier_plugins.gguf.server import LlamaServer

    with LlamaServer(gguf, context_length=512) as server:
        yield server.url


def test_the_same_model_answers_the_same_in_every_generator(
    tmp_path: Path, model: Artifact, gguf: Path, llama_server: str
) -> None:
    texts, sampling = ["Hello", "What is the time?"], Sampling(12)
    context = TestContext(tmp_path, {"m": model}, {"./m.gguf": gguf})
    here = answers(tmp_path, texts, sampling, context, uses="model", model="m")
    assert answers(tmp_path, texts, sampling, context, uses="llama", path="./m.gguf") == here
    assert answers(tmp_path, texts, sampling, context, url=llama_server) == here
    assert all(here)


def test_a_program_that_computes_here_is_asked_for_what_is_missing(tmp_path: Path, model: Artifact) -> None:
    context = TestContext(tmp_path, {"m": model})
    sampling = Sampling(6, temperature=1.0, n=3)
    first = answers(tmp_path, ["a", "b"], sampling, context, uses="model", model="m")
    with made(context, uses="model", model="m") as generator:
        again = Asker(generator, context).ask(requests_of("b", "a"), sampling)
        assert [answer.text for group in again for answer in group] == [*first[3:], *first[:3]]
        # Nothing was loaded for it.
        assert generator._inner is None  # pyright: ignore


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_program_that_dies_keeps_what_it_answered_and_ends_as_if_it_had_not(
    tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr("luthier.serving.asking.TOGETHER", 4)
    texts = [f"{'long ' * (n % 5)}{n}" for n in range(10)]
    sampling = Sampling(5, temperature=temperature, n=2 if temperature else 1)
    contexts = [TestContext(tmp_path / name, {"m": model}) for name in ("whole", "broken")]
    whole = answers(tmp_path, texts, sampling, contexts[0], uses="model", model="m")
    assert not temperature or len(set(whole)) > 5

    def dying(self: Any, requests: Any, sampling: Sampling) -> Any:
        for number, group in enumerate(generate(self, requests, sampling)):
            if "9" in requests[number][-1]["content"]:
                raise ModelError("it died")
            yield group

    kind = type(made(contexts[1], uses="model", model="m"))
    generate = kind.generate
    with monkeypatch.context() as broken:
        broken.setattr(kind, "generate", dying)
        with pytest.raises(ModelError, match="it died"):
            answers(tmp_path, texts, sampling, contexts[1], uses="model", model="m")
    lines = [line for path in contexts[1].cache.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert 0 < len(lines) < len(whole)
    assert answers(tmp_path, texts, sampling, contexts[1], uses="model", model="m") == whole


def test_who_asks_the_same_twice_pays_once(tmp_path: Path) -> None:
    with chat_api(lambda request: request["messages"][-1]["content"].upper()) as server:
        assert answers(tmp_path, ["a", "b", "a", "a"], url=server.url) == ["A", "B", "A", "A"]
        assert sorted(server.texts) == ["a", "b"]


def test_llama_cpp_holds_answers_to_a_json_schema(tmp_path: Path, gguf: Path, llama_server: str) -> None:
    context = TestContext(tmp_path, paths={"./m.gguf": gguf})
    sampling = Sampling(40, json_schema={"type": "string", "enum": ["certainly", "not at all"]})
    for config in ({"uses": "llama", "path": "./m.gguf"}, {"url": llama_server}):
        (text,) = answers(tmp_path, ["Is it good?"], sampling, context, **config)
        assert json.loads(text) in ("certainly", "not at all")


def test_a_generator_that_cannot_hold_to_a_schema_says_so(tmp_path: Path, model: Artifact) -> None:
    context = TestContext(tmp_path, {"m": model})
    with pytest.raises(ModelError, match="cannot hold answers to a JSON schema"):
        answers(tmp_path, ["a"], Sampling(json_schema={"type": "object"}), context, uses="model", model="m")
