"""Merging models whose tokenizers differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from luthier.api import Artifact, ModelError
from luthier.artifacts.texts import chat_template
from luthier.merging.config import MergeConfig
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.registry import default_registry
from luthier.testing import resealed, run_stage, tiny_model
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

OTHER_TEXTS = ("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.", "Die Lampe steht auf dem Tisch.") * 9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def pair(store: Path) -> list[Artifact]:
    """Two models whose tokenizers were trained on different texts."""
    return [
        tiny_model(store, seed=1, dtype="float32", vocab_size=310, tied=False),
        tiny_model(store, seed=2, dtype="float32", vocab_size=330, tied=False, texts=OTHER_TEXTS),
    ]


def rows(artifact: Artifact, name: str = "model.embed_tokens.weight") -> tuple[torch.Tensor, dict[str, int]]:
    """A vocabulary tensor, and the row of each token."""
    return load_file(artifact.path / "model.safetensors")[name], load_tokenizer(artifact).get_vocab()


def test_different_tokenizers_are_refused_with_the_remedy(store: Path, pair: list[Artifact]) -> None:
    with pytest.raises(ModelError, match="different tokenizers; `tokenizer: union` joins them"):
        run_stage(store, "merge", inputs={"models": pair})


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_union_has_every_token_with_its_rows(store: Path, pair: list[Artifact], name: str) -> None:
    merged = run_stage(store, "merge", {"tokenizer": "union", "weights": [1, 3]}, inputs={"models": pair})
    (one, first), (two, second), (soup, union) = (rows(item, name) for item in (*pair, merged))
    assert set(union) == set(first) | set(second)
    assert all(union[token] == place for token, place in first.items()), "the first model's ids stay"
    for token, place in union.items():
        sides = [
            one[first[token]] if token in first else two[second[token]],
            two[second[token]] if token in second else one[first[token]],
        ]
        torch.testing.assert_close(soup[place], 0.25 * sides[0] + 0.75 * sides[1])
    assert merged.facts["vocab_size"] == len(soup)
    assert sum(merged.facts["tokens_from"].values()) == len(union) - len(first)
    assert set(json.loads((merged.path / "token_sources.json").read_text())) == set(union) - set(first)


def test_texts_come_back_whole_from_the_joint_tokenizer(store: Path, pair: list[Artifact]) -> None:
    merged = run_stage(store, "merge", {"tokenizer": "union"}, inputs={"models": pair})
    joint, first, second = (load_tokenizer(item) for item in (merged, *pair))
    for text in (*OTHER_TEXTS[:2], "The quick brown fox jumps over the lazy dog."):
        ids = joint(text)["input_ids"]
        assert joint.decode(ids) == text
        # Merges of both are known: no text takes more tokens than with the worse of the two.
        assert len(ids) <= max(len(first(text)["input_ids"]), len(second(text)["input_ids"]))
    logits = load_model(merged)(input_ids=torch.tensor([ids])).logits
    assert logits.shape[-1] == merged.facts["vocab_size"]


def test_one_models_tokenizer_moves_the_others_rows(store: Path, pair: list[Artifact]) -> None:
    merged = run_stage(
        store,
        "merge",
        {"tokenizer": "x", "method": "linear", "weights": [1, 0]},
        inputs={"models": pair, "tokenizer": pair[1]},
    )
    assert merged.facts["tokenizer"] == pair[1].facts["tokenizer"]
    (one, first), (two, second), (soup, chosen) = (rows(item) for item in (*pair, merged))
    assert chosen == second
    for token, place in chosen.items():
        expected = one[first[token]] if token in first else two[second[token]]
        torch.testing.assert_close(soup[place], expected)


def test_tokenizers_of_other_kinds_cannot_be_joined(store: Path, pair: list[Artifact], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "odd"
    shutil.copytree(pair[1].path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="their pre_tokenizer differ"):
        run_stage(store, "merge", {"tokenizer": "union"}, inputs={"models": [pair[0], resealed(folder)]})


def test_rows_of_tokens_and_padding_are_those_of_mergekit(
    store: Path, pair: list[Artifact], tmp_path: Path, cli: Any
) -> None:
    more = tiny_model(store, seed=3, dtype="float32", vocab_size=330, tied=False, texts=OTHER_TEXTS)
    for name, model in zip("abc", (*pair, more), strict=True):
        shutil.copytree(model.path, tmp_path / name, ignore=shutil.ignore_patterns("manifest.json"))
    (_, first), (_, second) = (rows(model) for model in pair)
    only_second = sorted(set(second) - set(first))
    tokens = {
        "<|new|>": {"source": {"kind": "zero"}},
        only_second[0]: {"source": {"kind": "model_token", "model": "./a", "token_id": 70}},
        only_second[1]: {"source": "./c"},
        "e": {"source": "./b", "force": True},
        "t": {"source": {"kind": "model_token", "model": "./a", "token": "z"}, "force": True},
    }
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    content = {
        "models": [{"model": f"./{name}", "parameters": {"weight": value}} for name, value in weights.items()],
        "merge_method": "linear",
        "dtype": "float32",
        "chat_template": "chatml",
        "tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64},
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(content))
    text = (tmp_path / "merge.yml").read_text().replace("./", f"{tmp_path}/")
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), options)
    done = cli("do", "merge", f"config={tmp_path}/merge.yml", "--out", "ours")
    assert done.returncode == 0, done.stderr
    joint, expected = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert joint.chat_template == expected.chat_template
    # One look at each: the order of a vocabulary is another every time.
    ids, their_ids = joint.get_vocab(), expected.get_vocab()
    assert ids.keys() == their_ids.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found, there = (load_file(tmp_path / side / "model.safetensors")[name] for side in ("ours", "theirs"))
        assert len(found) == len(there) == 64 * -(-len(ids) // 64)
        for token, place in ids.items():
            torch.testing.assert_close(found[place], there[their_ids[token]], rtol=1e-5, atol=1e-6, msg=token)
        torch.testing.assert_close(found[-1], there[-1], rtol=1e-4, atol=1e-5)


def test_a_new_token_begins_at_the_mean_and_models_that_share_a_vocabulary_may_get_one(
    store: Path, pair: list[Artifact]
) -> None:
    other = tiny_model(store, seed=5, dtype="float32", vocab_size=310, tied=False)
    config = {"tokens": [{"token": "<|tool|>"}], "pad_to_multiple_of": 32}
    merged = run_stage(store, "merge", config, inputs={"models": [pair[0], other]})
    found, vocabulary = rows(merged)
    place = vocabulary["<|tool|>"]
    assert merged.facts["vocab_size"] == len(found) == 32 * -(-(place + 1) // 32)
    (one, _), (two, _) = rows(pair[0]), rows(other)
    for row in found[place:]:
        torch.testing.assert_close(row, ((one + two) / 2).mean(dim=0), rtol=1e-4, atol=1e-5)
    ids = load_tokenizer(merged)("a<|tool|>b", add_special_tokens=False).input_ids
    assert ids.count(place) == 1
    assert json.loads((merged.path / "token_sources.json").read_text()) == {"<|tool|>": "new"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model": "x", "like": "nothing of the kind"}, "has none for 'nothing of the kind'"),
        ({"model": "x", "like": 5000}, "has none for 5000"),
        ({"model": "other"}, "`tokens` names"),
    ],
)
def test_rows_that_there_are_not_are_refused(store: Path, pair: list[Artifact], entry: dict, message: str) -> None:
    config = {"tokenizer": "union", "tokens": [{"token": "<|tool|>", **entry}]}
    stranger = tiny_model(store, seed=9, dtype="float32", vocab_size=310, tied=False)
    given = {"models": pair, "tokens.0.model": stranger if entry["model"] == "other" else pair[1]}
    with pytest.raises(ModelError, match=message):
        run_stage(store, "merge", config, inputs=given)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"like": "b"}, "names a token of a `model`"),
        ({"force": True}, "`force` needs a source"),
        ({"zero": True, "model": "m"}, "come from no model"),
        ({"token": ""}, "at least 1 character"),
    ],
)
def test_rows_that_come_from_nowhere_are_refused(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig.model_validate(
            {"models": ["m"], "tokens": [{"token": "a", **entry}]}, context={"components": default_registry()}
        )


def chatty(store: Path, folder: Path, seed: int) -> Artifact:
    """A model that also stops at its own token."""
    model = tiny_model(store, seed=seed, dtype="float32", texts=OTHER_TEXTS)
    shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns("manifest.json"))
    row = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"]) - 1
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": row, "content": "<|end|>"})
    tokenizer["model"]["vocab"] = {token: place for token, place in tokenizer["model"]["vocab"].items() if place != row}
    kept = tokenizer["model"]["vocab"]
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) in kept]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, row]}))
    return run_stage(store, "base", {"source": str(folder)})


def test_a_base_learns_to_stop_with_the_template_in_its_new_vocabulary(store: Path, tmp_path: Path) -> None:
    base, chat = tiny_model(store, seed=41, dtype="float32"), chatty(store, tmp_path / "chat", 42)
    raw = tmp_path / "raw"
    shutil.copytree(base.path, raw, ignore=shutil.ignore_patterns("manifest.json", "chat_template.jinja"))
    lead = run_stage(store, "base", {"source": str(raw)})
    assert chat_template(lead.path) is None
    merged = run_stage(store, "merge", {"tokenizer": "union"}, inputs={"models": [lead, chat]})
    (place,) = load_tokenizer(merged).convert_tokens_to_ids(["<|end|>"])
    assert place not in chat.facts["stop_token_ids"], "it has moved"
    assert merged.facts["stop_token_ids"] == [2, place]
    assert chat_template(merged.path) == chat_template(chat.path)


def test_layers_of_models_with_other_vocabularies_are_stacked(store: Path, pair: list[Artifact]) -> None:
    slices = [{"sources": [{"layers": [0, 1]}]}, {"sources": [{"layers": [0, 2]}]}]
    inputs = {f"slices.{place}.sources.0.model": model for place, model in enumerate(pair)}
    config = {"slices": slices, "method": "passthrough", "tokenizer": "union"}
    merged = run_stage(store, "merge", config, inputs=inputs)
    (one, first), (found, joint) = rows(pair[0]), rows(merged)
    for token, place in first.items():
        assert torch.equal(found[joint[token]], one[place])
    with pytest.raises(ModelError, match=r"different tokenizers"):
        run_stage(store, "merge", {**config, "tokenizer": "base"}, inputs=inputs)


def test_a_template_is_not_given_to_a_model_without_a_tokenizer(store: Path, tmp_path: Path) -> None:
    models = []
    for seed in (51, 52):
        model = tiny_model(store, seed=seed)
        shutil.copytree(
            model.path, tmp_path / str(seed), ignore=shutil.ignore_patterns("manifest.json", "*token*.json")
        )
        models.append(run_stage(store, "base", {"source": str(tmp_path / str(seed))}))
    run_stage(store, "merge", inputs={"models": models})
    with pytest.raises(ModelError, match="a chat template needs a tokenizer"):
        run_stage(store, "merge", {"chat_template": "chatml"}, inputs={"models": models})


TALK = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def test_the_chat_template_is_the_one_that_was_chosen(store: Path, tmp_path: Path) -> None:
    models = [tiny_model(store, seed=seed) for seed in (31, 32, 33)]
    own = chat_template(models[0].path)
    for model in models[1:]:
        shutil.copytree(model.path, tmp_path / model.key, ignore=shutil.ignore_patterns("manifest.json"))
        (tmp_path / model.key / "chat_template.jinja").write_text(TALK)
    models[1:] = [run_stage(store, "base", {"source": str(tmp_path / model.key)}) for model in models[1:]]
    expected = {None: own, "auto": TALK, "{{ messages }}": "{{ messages }}"}
    for choice, text in expected.items():
        merged = run_stage(store, "merge", {"chat_template": choice}, inputs={"models": models})
        assert chat_template(merged.path) == text
        warned = "\n".join(merged.manifest["warnings"])
        assert ("does not go with the model" in warned) == (choice == "{{ messages }}"), warned
    with pytest.raises(ModelError, match="neither Jinja text nor a name: 'chatlm'; there are auto, alpaca, chatml"):
        run_stage(store, "merge", {"chat_template": "chatlm"}, inputs={"models": models})


def test_padding_rows_stay_what_they_are(store: Path, pair: list[Artifact]) -> None:
    """The rows after the last token are the same in models of one family: nothing may differ there."""
    import shutil

    from safetensors.torch import save_file

    padded = []
    for place, model in enumerate((pair[0], tiny_model(store, seed=5, dtype="float32", vocab_size=310, tied=False))):
        folder = store / f"padded-{place}" / model.key
        shutil.copytree(model.path, folder)
        tensors = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(16, tensors[name].shape[1])])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 16}))
        padded.append(resealed(folder))
    plain, joint = (
        load_file(
            run_stage(store, "merge", {"tokenizer": choice}, inputs={"models": padded}).path / "model.safetensors"
        )
        for choice in ("base", "union")
    )
    for name, tensor in plain.items():
        assert torch.equal(tensor, joint[name]), name


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_embeddings_of_other_names_have_rows_too(tmp_path: Path, kind: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2}, "GPTNeoX": small}[kind]
    tokens = tiny_model(tmp_path / "t")

    def made(name: str, rows: int) -> Path:
        config = getattr(transformers, f"{kind}Config")(vocab_size=rows, **sizes)
        getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "GPTNeoXForCausalLM")(config).save_pretrained(
            tmp_path / name
        )
        for text in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokens.path / text, tmp_path / name / text)
        return tmp_path / name

    with pytest.raises(ModelError, match="tokens, the embedding only 40 rows"):
        run_stage(tmp_path / "s", "base", {"source": str(made("small", 40))})
    pair = [run_stage(tmp_path / "s", "base", {"source": str(made(name, 400))}) for name in "ab"]
    merged = run_stage(tmp_path / "s", "merge", {"tokenizer": "union"}, inputs={"models": pair})
    assert merged.facts["tokenizer"] == pair[0].facts["tokenizer"]


def test_a_special_token_that_one_model_has_is_special_in_the_union(store: Path, tmp_path: Path) -> None:
    models = [tiny_model(store, seed=seed, dtype="float32") for seed in (21, 22)]
    folder = tmp_path / "more"
    shutil.copytree(models[1].path, folder, ignore=shutil.ignore_patterns("manifest.json"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    row = len(embedding)
    entry = {**tokenizer["added_tokens"][-1], "id": row, "content": "<|tool|>", "special": True}
    tokenizer["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": row + 1}))
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, torch.full((1, embedding.shape[1]), 0.25)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    more = run_stage(store, "base", {"source": str(folder)})
    merged = run_stage(store, "merge", {"tokenizer": "union"}, inputs={"models": [models[0], more]})
    made = load_tokenizer(merged)
    (place,) = made.convert_tokens_to_ids(["<|tool|>"])
    added = {item["content"]: item for item in json.loads((merged.path / "tokenizer.json").read_text())["added_tokens"]}
    assert added["<|tool|>"]["special"] is True
    assert added["<|tool|>"]["id"] == place
    assert made("a<|tool|>b", add_special_tokens=False).input_ids.count(place) == 1
    found = load_file(merged.path / "model.safetensors")["model.embed_tokens.weight"][place]
    torch.testing.assert_close(found, torch.full_like(found, 0.25))
