"""Parts of models that are no graph: the model's own code runs, and its values are noted down or replaced."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyseq._capture import (
    LOCK,
    SIZES,
    VALUES,
    Frame,
    arguments,
    instead,
    leaves,
    mapped,
    of_torch,
    place,
    signature,
    untouched,
    version,
)
from pyseq.surgery._parts import found, hold_tensor, shell, shown

READS = (*VALUES, "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__")


class _Done(BaseException):
    """All that was asked for is there; past every `except Exception`."""


class Run(TorchFunctionMode):
    """One run of a model, its values called as in a capture.

    replace: by address, what takes a value's place. keep: addresses whose values are noted down, at which the run stops
    if `stop`; None: all. stray: tensors of the model's inputs that its result must not hang on.
    """

    def __init__(
        self, model: nn.Module, replace: Mapping[str, Any], keep: Sequence[str] | None, stop: bool, stray: list[Tensor]
    ) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self.modules = {*self.paths.values()}
        self.replace, self.keep, self.stop = replace, keep, stop
        self.frames: list[tuple[Frame, bool]] = [(Frame(""), True)]  # and whether functions in it have names
        self.times: Counter[str] = Counter()
        self.values: dict[str, Any] = {}  # by address and call
        self.stray: dict[int, str] = {}  # storages that hang on the inputs, with a name
        self.fresh: set[int] = set()  # storages that hang on replacements
        self.alive: list[Any] = [*stray]  # no address is used again
        self.leaks: dict[str, None] = {}
        self.used: set[str] = set()  # parameters and buffers that values took that are not stray
        self.passed: set[str] = set()  # those that others took
        self.random = torch.get_rng_state()
        self.sized = ""  # the sizes that replacements have in the example, where they have others now
        for x in stray:
            self.stray[storage(x)] = "an input"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        stray = next((self.stray[at] for at in map(storage, given) if at in self.stray), None)
        if stray and name in READS:
            raise ValueError(
                f"the model's code reads values of {stray} at {place()}, which the part does not see: "
                "add what they come from to inputs"
            )
        before = [version(x) for x in given]
        result = func(*args, **kwargs)
        made = [x for x in leaves(result) if isinstance(x, Tensor)]
        if stray and self.sized and self.frames[-1][1] and reads_size(func):
            raise ValueError(
                f"the model's code reads a size of {stray} at {place()}, which this part takes from its example: give "
                f"values of the example's sizes, {self.sized}, or add what that comes from to inputs"
            )
        if not made and name == "__get__":
            return result
        (self.passed if stray else self.used).update(self.names[id(x)] for x in given if id(x) in self.names)
        frame, named = self.frames[-1]
        address = frame.address(name, self.modules) if named and made else None
        written = [x for x, old in zip(given, before, strict=True) if version(x) != old]
        self._spread(stray, given, [*made, *written], address or frame.path)
        return result if address is None else self.at(address, result)

    def _spread(self, stray: str | None, given: list[Tensor], made: list[Tensor], name: str) -> None:
        if not self.stray and not self.fresh:
            return
        fresh = any(storage(x) in self.fresh for x in given)
        if stray and fresh:
            self.leaks[f"{stray} is wanted by {name!r}"] = None
        for x in made:
            self.alive.append(x)
            if fresh:
                self.fresh.add(storage(x))
            if stray:
                self.stray[storage(x)] = repr(name)

    def called(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if path is None:
            return original(module, *args, **kwargs)
        self.frames.append((Frame(path), not of_torch(module)))
        kept = [(x, x.clone()) for x in module.buffers(recurse=False)] if self._is_stray((args, kwargs)) else []
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.frames.pop()
            for x, old in kept:  # statistics of values that do not count
                x.copy_(old)
        return self.at(path, result) if path else result

    def _is_stray(self, tree: Any) -> bool:
        return any(storage(x) in self.stray for x in leaves(tree) if isinstance(x, Tensor))

    def at(self, address: str, value: Any) -> Any:
        """A value has come to be: replace it, note it down, go on or not."""
        call = self.times[address]
        self.times[address] += 1
        numbered = f"{address}#{call}"
        name = next((x for x in (numbered, address) if x in self.replace and (x == numbered or call == 0)), None)
        if name is not None:
            value = self.replace[name]
            if not self.fresh and self.stray:
                torch.set_rng_state(self.random)  # what was drawn before does not count
            self.fresh.update(storage(x) for x in leaves(value) if isinstance(x, Tensor))
        wanted = numbered if self.keep is None else next(
            (x for x in self.keep if x == numbered or (x == address and call == 0)), None
        )  # fmt: skip
        if wanted is not None:
            self.values[wanted] = mapped(copied, value, build=True) if self.keep else value
            if self.stop and len(self.values) == len(self.keep or ()):
                raise _Done
        return value

    @contextmanager
    def running(self) -> Iterator[None]:
        with LOCK, instead("__call__", self.called), self:
            yield


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else id(x)


@torch.compiler.disable
def run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, replace: Mapping[str, Any] | None = None,
    keep: Sequence[str] | None = (), stop: bool = False, stray: list[Tensor] | None = None,
    seen: list[Run] | None = None, sized: str = "",
) -> Any:  # fmt: skip
    """The model's result, or the values at `keep` where that names some; seen gets the run."""
    one = Run(model, replace or {}, keep, stop, stray or [])
    one.sized = sized
    if seen is not None:
        seen.append(one)
    result: Any = None
    try:
        with one.running():
            result = model(*args, **kwargs)
    except _Done:
        pass
    if missing := [x for x in (*(replace or ()), *(keep or ())) if x.partition("#")[0] not in one.times]:
        raise ValueError(f"this run of the model did not come to {', '.join(map(repr, missing))}")
    if keep:
        each = tuple(one.values[x] for x in keep)
        result = each[0] if len(each) == 1 else each
    if stray and one._is_stray(result):
        why = "; ".join(one.leaks) or "the result does not hang on it"
        raise ValueError(f"the cut at {', '.join(map(repr, replace or ()))} leaks: {why}")
    return result


def listing(model: nn.Module, example: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The values of each address, and the inputs."""
    args, kwargs = arguments(model, example)
    seen: list[Run] = []
    with untouched(model):
        run(model, args, kwargs, keep=None, seen=seen)
    places: dict[str, list[Any]] = {}
    for address, value in seen[0].values.items():
        places.setdefault(address.partition("#")[0], []).append(value)
    return places, signature(model, args, kwargs)


class Intercepted(nn.Module):
    """What `submodel` gives of a model that is no graph, `reason` says why: the model's own code runs inside.

    It holds the model, which is trained, moved and copied with it; its parameters are those that can matter to it.
    """

    def __init__(
        self, model: nn.Module, inputs: list[str] | None, outputs: list[str] | None, example: Any, reason: str
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.reason = inputs, outputs, reason
        self._held = (model,)  # unseen by torch: only what is used is a part of this module
        places, own = listing(model, example)
        for name in (*(inputs or ()), *(outputs or ())):
            found(places, own, name)
        self._example = own if inputs is not None else None
        self._sizes = [sizes(found(places, own, name)) for name in inputs or ()]
        self.training = model.training
        drop = self._trial(places, own)
        persistent = set(model.state_dict())
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if name not in drop:
                owner, _, last = name.rpartition(".")
                hold_tensor(shell(self, model, owner), last, x, name in persistent)

    def _trial(self, places: Mapping[str, list[Any]], own: dict[str, Any]) -> set[str]:
        """Run on the example; returns the parameters and buffers that only the rest of the model uses."""
        model = self._held[0]
        seen: list[Run] = []
        with untouched(model):
            if self.inputs is not None:
                copies = [mapped(copied, found(places, own, name), build=True) for name in self.inputs]
                self._tail(copies, {}, seen)
                return seen[0].passed - seen[0].used
            if self.outputs is None:
                return set()
            run(model, (), own, keep=self.outputs, stop=True, seen=seen)
            run(model, (), own, seen=seen)
        return seen[1].used - seen[0].used

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The values at `outputs`: one as it is, several as a tuple."""
        if self.inputs is None:
            return run(self._held[0], args, kwargs, keep=self.outputs or (), stop=bool(self.outputs))
        return self._tail(args, kwargs, None)

    def _tail(self, args: Sequence[Any], kwargs: Mapping[str, Any], seen: list[Run] | None) -> Any:
        names = self.inputs or []
        if len(args) != len(names) or kwargs:
            raise TypeError(f"expected {len(names)} values, at {', '.join(names)}, got {len(args) + len(kwargs)}")
        given = dict(zip(names, args, strict=True))
        own = dict(self._example or {})
        device = next((x.device for x in leaves(args) if isinstance(x, Tensor)), None)
        stray = []
        for name, x in own.items():
            if name in given:
                own[name] = given.pop(name)
            else:
                own[name] = mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x, build=True)
                stray += [x for x in leaves(own[name]) if isinstance(x, Tensor)]
        same = [sizes(x) for x in args] == self._sizes
        return run(
            self._held[0], (), own, replace=given, keep=self.outputs or (), stop=bool(self.outputs), stray=stray,
            seen=seen, sized="" if same else ", ".join(str(x) for one in self._sizes for x in one),
        )  # fmt: skip

    def train(self, mode: bool = True) -> "Intercepted":
        super().train(mode)
        self._held[0].train(mode)
        return self

    def extra_repr(self) -> str:
        return f"inputs: {shown(self.inputs)}; outputs: {shown(self.outputs)}; runs the model's code: {self.reason}"


def reads_size(func: Any) -> bool:
    name = func.__name__
    return name in SIZES or (name == "__get__" and getattr(func.__self__, "__name__", "") == "shape")


def sizes(tree: Any) -> list[tuple[int, ...]]:
    return [(*x.shape,) for x in leaves(tree) if isinstance(x, Tensor)]


def copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
