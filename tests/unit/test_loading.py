"""Where a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from luthier.modeling.loading import to_best_device
from torch import nn


class Moved(nn.Linear):
    """A layer of 4,000 bytes that tells where it was moved to, without a GPU."""

    moved = ""

    def __init__(self) -> None:
        super().__init__(1000, 1, bias=False)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moved = args[0]
        return self


@pytest.mark.parametrize(("there", "free", "where"), [(False, 10**9, ""), (True, 10**9, "cuda"), (True, 5_999, "")])
def test_a_model_goes_where_there_is_room_for_it(
    there: bool, free: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    assert to_best_device(Moved()).moved == where
