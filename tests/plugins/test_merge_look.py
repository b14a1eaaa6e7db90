"""The look at a written model by a process that imports transformers without what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_models import make_model
from luthier.testing import tiny_model

FOUND = {"loaded": "memory", "forward": "finite"}


def run(code: str, *, given: str = "", arguments: tuple[str, ...] = ()) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("store")).path


def test_models_of_all_kinds_are_looked_at_without_the_compiler(tmp_path: Path, model: Path) -> None:
    kinds = ["gemma3", "qwen2", "qwen3-moe", "deepseek-v3", "phi3-long"]
    folders = [str(model), *(str(make_model(tmp_path / kind, kind)) for kind in kinds)]
    code = (
        "import json, sys; from pathlib import Path\n"
        "from luthier_plugins.merge.lean import import_transformers\n"
        "from luthier_plugins.merge.look import looked\n"
        "import_transformers().utils.logging.disable_progress_bar()\n"
        "heavy = ['torch._dynamo.eval_frame', 'torch.distributed.tensor', 'torch._inductor.compile_fx']\n"
        "assert not set(heavy) & set(sys.modules)\n"
        "print(json.dumps([looked(Path(folder)) for folder in sys.argv[1:]]))\n"
        "assert not set(heavy) & set(sys.modules)\n"
    )
    assert json.loads(run(code, arguments=tuple(folders))) == [FOUND] * len(folders)


def test_who_needs_the_compiler_gets_it() -> None:
    code = (
        "import sys, torch; from luthier_plugins.merge.lean import import_transformers\n"
        "import_transformers()\n"
        "from transformers.masking_utils import TransformGetItemToIndex\n"
        "assert 'torch._dynamo.eval_frame' not in sys.modules\n"
        "with TransformGetItemToIndex():\n"
        "    print(torch.arange(3)[torch.tensor(1)].item())\n"
        "assert 'torch._dynamo.eval_frame' in sys.modules\n"
        "print(torch._dynamo.config.recompile_limit > 0)\n"
    )
    assert run(code).split() == ["1", "True"]


def test_where_the_compiler_is_loaded_nothing_is_changed() -> None:
    code = (
        "import torch, torch._dynamo\n"
        "before = torch.compile, torch.compiler.disable, torch._dynamo\n"
        "from luthier_plugins.merge.lean import import_transformers\n"
        "import_transformers()\n"
        "print(before == (torch.compile, torch.compiler.disable, torch._dynamo), torch.distributed.is_available())\n"
    )
    assert run(code).split() == ["True", "True"]


def test_a_model_that_fails_is_looked_at_with_all_of_transformers(model: Path) -> None:
    code = (
        "from luthier_plugins.merge import look\n"
        "look.looked = lambda folder: {'problem': 'something is missing'}\n"
        "look.main()\n"
    )
    assert json.loads(run(code, given=f"{model}\n")) == FOUND


def test_libraries_that_need_what_is_left_out_are_imported_whole(model: Path) -> None:
    code = (
        "import sys; from luthier_plugins.merge import lean, look\n"
        "def importing():\n    lean.import_transformers()\n    from torch._dynamo.utils import counters\n"
        "look.import_transformers = importing\n"
        "look.main()\n"
    )
    assert json.loads(run(code, given=f"{model}\n")) == FOUND


def test_a_merge_that_was_given_up_is_not_looked_at() -> None:
    assert run("from luthier_plugins.merge import look; look.main()") == ""
