"""Models that may be larger than the memory: weights are read layer by layer, for all texts at once.

Texts go through the own code of the model in threads, of which one moves at a time. Before a layer they wait for
each other: its weights are read, each text passes, and the weights are dropped. So one layer is in memory, with the
hidden states of all texts, and what is computed is what the whole model does, whatever its layers hand to each other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import psutil
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from luthier.api.errors import ModelError
from luthier.api.estimates import COMPARED, comparing_memory
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import shape_facts
from luthier.artifacts.tensors import TensorHeader, model_tensors

FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PIECE = 1 << 24
"""Bytes that are read at a time: beside a tensor in float32 there is not the whole of it as it is stored."""
TOGETHER = COMPARED
"""Tokens that are computed at a time, padding included: more are no faster, and their logits take memory."""
ALIKE = 0.6
"""How long a text is at least that is computed with a longer one, as a share of it."""
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Unit:
    """What is read and dropped together: a decoder layer, or one module outside of them.

    Attributes:
        module: Its name.
        names: Its parameters.
        keys: What they are made of, by the names in the files.
        again: What a text stands before when it has been through and goes through a second time; None: it does not.
    """

    module: str
    names: list[str]
    keys: list[str] = field(default_factory=list[str])
    again: _Unit | None = None


class _Abandoned(BaseException):
    """Ends the thread of a text that nobody waits for."""


class _Traveller(threading.Thread, Generic[Result]):
    """One text on its way through the model; it moves when it is told to.

    Attributes:
        at: The unit that it stands before; None once it has arrived.
        result: What it found.
        error: What stopped it.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        super().__init__(daemon=True)
        self.at: _Unit | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self._work = work
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        _CURRENT.traveller = self
        try:
            if not self.abandoned:
                with torch.no_grad():
                    self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again where the text is waited for
            self.error = error
        self.at = None
        self._stands.release()

    def move(self) -> None:
        """Let it go on to the next unit, or to the end, and wait until it is there."""
        self._go.release()
        self._stands.acquire()
        if self.error is not None and not self.abandoned:
            raise self.error

    def stand(self, unit: _Unit) -> None:
        """Called by itself: wait before a unit."""
        self.at = unit
        self._stands.release()
        self._go.acquire()
        if self.abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Have it end wherever it is."""
        if self.is_alive():
            self.abandoned = True
            self._go.release()
            self.join()


class _Current(threading.local):
    """Whose thread this is."""

    traveller: _Traveller[Any] | None = None


_CURRENT = _Current()


class Streamed:
    """A model folder that is read layer by layer.

    Args:
        folder: Full weights, in a plain dtype.
        dtype: What it computes in; buffers, such as rotary frequencies, stay in float32.
        device: Where it computes; by default on a GPU where there is one.

    Attributes:
        config: The model's config.
        model: The model without weights, for hooks on its modules: these run while the weights are there.

    Raises:
        ModelError: transformers does not know the architecture, or weights are missing.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, device: str | None = None) -> None:
        # One layer after the other is loaded: a bar for each says nothing.
        transformers.utils.logging.disable_progress_bar()
        self.folder = folder
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        try:
            self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
            with init_empty_weights(include_buffers=False):
                self.model: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers cannot load the model: {error}", where=str(folder)) from error
        self.model.tie_weights()
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._headers = model_tensors(folder)
        self._check_room()
        self._empty: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        self._mapping: list[Any] = get_model_conversion_mapping(self.model)
        self._units = self._watched_units()
        self._assign_files()

    def logits(self, sequences: Sequence[Sequence[int]]) -> Generator[tuple[int, Tensor]]:
        """The logits of all positions of each text: its place, and float32 on the CPU, shape (tokens, vocabulary).

        Texts of about one length are computed together, and come together: the order depends on the lengths alone.

        Args:
            sequences: Token ids of texts.
        """
        groups = groups_of([len(ids) for ids in sequences])

        def of(group: Sequence[int]) -> Callable[[], Tensor]:
            inputs = _padded([sequences[place] for place in group], self.device)
            return lambda: self.model(**inputs, use_cache=False).logits

        found = self.walk([of(group) for group in groups])
        yield from _each(groups, sequences, found)

    def walk(
        self, works: Sequence[Callable[[], Result]], revise: Callable[[str], None] = lambda module: None
    ) -> Iterator[Result]:
        """What several calls of the model return, in their order: they go through its layers side by side.

        Args:
            works: Each calls `model`, once or more.
            revise: Called with the name of each unit that `revised` named, when all texts have been through it: it may
                change the weights, and the texts go through once more.
        """
        travellers = [_Traveller(work) for work in works]
        for traveller in travellers:
            traveller.start()
        try:
            for traveller in travellers:
                traveller.move()
            waiting = list(travellers)
            while waiting:
                unit = waiting[0].at
                if unit is None:
                    yield cast("Result", waiting.pop(0).result)
                    continue
                self._load(unit)
                yield from _through(waiting, unit)
                if unit.again is not None:
                    revise(unit.module)
                    yield from _through(waiting, unit.again)
                self._drop(unit)
        finally:
            for traveller in travellers:
                traveller.abandon()

    def _check_room(self) -> None:
        """Refuse what even one layer of is too large.

        Raises:
            ModelError: there is too little memory.
        """
        parameters = sum(math.prod(header.shape) for header in self._headers.values())
        shape = shape_facts(read_json(self.folder / "config.json"), self._headers)
        rows = self.config.get_text_config().vocab_size
        needed = comparing_memory({**shape, "parameters": parameters, "vocab_size": rows})
        if needed is None or self.device != "cpu":
            return
        free = psutil.virtual_memory().available
        if needed > free:
            raise ModelError(
                f"computing it layer by layer takes {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} are free",
                where=str(self.folder),
                hint="end other programs, or do this on a machine with more",
            )

    def revised(self, modules: Iterable[str]) -> None:
        """Have texts go twice through the units that hold these modules: see `walk`.

        Args:
            modules: Names of modules with weights.
        """
        for name in modules:
            unit = next(unit for unit in self._units.values() if f"{name}.weight" in unit.names)
            if unit.again is None:
                unit.again = _Unit(unit.module, [])
                _go_twice(self.model.get_submodule(unit.module), unit.again)

    # -- units -------------------------------------------------------------------------------------

    def _watched_units(self) -> dict[str, _Unit]:
        """The units by their modules' names; each text waits before them."""
        blocks = self._blocks()
        found: dict[str, _Unit] = {}
        for name, module in self.model.named_modules():
            inside = next((block for block in blocks if name.startswith(f"{block}.")), None)
            whole = name in blocks
            if inside is not None or (not whole and not list(module.named_parameters(recurse=False))):
                continue
            parts = [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]
            found[name] = _Unit(name, [f"{name}.{part}" if name else part for part, _ in parts])
            module.register_forward_pre_hook(_waits(found[name]), prepend=True)
        return found

    def _blocks(self) -> list[str]:
        """The names of the decoder layers."""
        count = self.config.get_text_config().num_hidden_layers
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return [f"{name}.{place}" for place in range(count)]
        return []

    def _assign_files(self) -> None:
        """Which tensors of the files each unit is made of.

        Raises:
            ModelError: nothing becomes one of the parameters.
        """
        unit_of = {name: unit for unit in self._units.values() for name in unit.names}
        made: set[str] = set()
        for key in self._headers:
            target = self._target(key)
            unit = unit_of.get(target)
            if unit is not None:
                unit.keys.append(key)
                made.add(target)
        # What is tied has the same parameter under several names, and one tensor in the files.
        same: dict[int, list[str]] = {}
        for name, parameter in self._empty.items():
            same.setdefault(id(parameter), []).append(name)
        self._source: dict[str, str] = {}
        for names in same.values():
            owner = next((name for name in names if name in made), None)
            for name in names:
                if owner is not None and name not in made and name in unit_of:
                    self._source[name] = owner
                    unit_of[name].keys += [key for key in self._headers if self._target(key) == owner]

    def _target(self, key: str) -> str:
        """The parameter that a tensor of the files becomes, or the first of several."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        names = self._state_names
        found, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, names)
        if found not in names and key in names:
            found, _ = rename_source_key(key, [], [], self.model.base_model_prefix, names)
        return found

    @property
    def _state_names(self) -> dict[str, Any]:
        if not hasattr(self, "_names"):
            self._names: dict[str, Any] = self.model.state_dict()
        return self._names

    # -- weights -----------------------------------------------------------------------------------

    def _load(self, unit: _Unit) -> None:
        """Read a unit's weights.

        Raises:
            ModelError: one of them is not in the files.
        """
        state = {key: read_tensor(self.folder, self._headers[key]) for key in unit.keys}
        settings = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self._mapping, device_map={"": self.device})
        convert_and_load_state_dict_in_model(self.model, state, settings)
        state.clear()
        for name, source in self._source.items():
            if name in unit.names:
                _put(self.model, name, self.model.get_parameter(source))
        for source in set(self._source.values()) - set(unit.names):
            _put(self.model, source, self._empty[source])
        lacking = [name for name in unit.names if name in self._empty and self.model.get_parameter(name).is_meta]
        if lacking:
            raise ModelError(f"the weights lack {lacking[0]}", where=str(self.folder))

    def _drop(self, unit: _Unit) -> None:
        for name in unit.names:
            if name in self._empty:
                _put(self.model, name, self._empty[name])


class Whole:
    """A model in memory that is asked as one that is read layer by layer.

    Args:
        model: The model; where it is, there it computes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config: Any = model.config

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """See `Streamed.logits`: in the same order."""
        groups = groups_of([len(ids) for ids in sequences])

        def found() -> Iterator[Tensor]:
            for group in groups:
                inputs = _padded([sequences[place] for place in group], self.model.device)
                with torch.no_grad():
                    yield self.model(**inputs, use_cache=False).logits

        yield from _each(groups, sequences, found())


def _padded(texts: Sequence[Sequence[int]], device: Any) -> dict[str, Tensor]:
    """Texts as one batch: what follows a text does not change it."""
    given = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(given)
    for row, ids in enumerate(texts):
        given[row, : len(ids)] = torch.tensor(list(ids))
        mask[row, : len(ids)] = 1
    return {"input_ids": given.to(device), "attention_mask": mask.to(device)}


def _each(
    groups: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]], found: Iterator[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """The logits of each text of each group."""
    for group, logits in zip(groups, found, strict=True):
        for row, place in enumerate(group):
            yield place, logits[row, : len(sequences[place])].float().cpu()


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """Places of texts that are computed together: of about one length, and not too many."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[place] >= ALIKE * longest and (len(groups[-1]) + 1) * longest <= TOGETHER:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _through(waiting: list[_Traveller[Result]], unit: _Unit) -> Iterator[Result]:
    """Let those go on that stand before a unit; give the results of those that arrive, in their order."""
    for traveller in list(waiting):
        if traveller.at is unit:
            traveller.move()
        # One that is through is not given before those in front of it.
        if traveller is waiting[0] and traveller.at is None:
            waiting.pop(0)
            yield cast("Result", traveller.result)
            traveller.result = None


def _go_twice(module: nn.Module, again: _Unit) -> None:
    """Have a module compute, wait, and compute anew: what it gives is what it gives the second time."""
    once = module.forward

    def twice(*inputs: Any, **settings: Any) -> Any:
        if _CURRENT.traveller is not None:
            once(*inputs, **settings)
            _CURRENT.traveller.stand(again)
        return once(*inputs, **settings)

    module.forward = twice


def _waits(unit: _Unit) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        if _CURRENT.traveller is not None:
            _CURRENT.traveller.stand(unit)

    return hook


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Have a parameter be this one."""
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = parameter


def read_tensor(folder: Path, header: TensorHeader) -> Tensor:
    """A tensor of a safetensors file, floats as float32.

    Raises:
        ModelError: the file ends before the tensor does, or its dtype is none of a plain model's.
    """
    dtype = FLOATS.get(header.dtype)
    if dtype is None:
        raise ModelError(f"{header.name} is stored in {header.dtype}, which is not read here", where=str(folder))
    out = torch.empty(header.shape, dtype=torch.float32)
    flat, buffer = out.view(-1), bytearray(min(PIECE, header.size))
    with (folder / header.file).open("rb", buffering=0) as file:
        file.seek(header.start)
        done = 0
        while done < flat.numel():
            view = memoryview(buffer)[: min(len(buffer), (flat.numel() - done) * dtype.itemsize)]
            got = 0
            while got < len(view):
                count = file.readinto(view[got:])
                if not count:
                    raise ModelError("ends before the tensor does", where=f"{folder / header.file}: {header.name}")
                got += count
            piece = torch.frombuffer(view, dtype=dtype)
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
    return out
