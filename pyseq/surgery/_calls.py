"""Modules that are called several times in one forward: counting their calls, and giving each call its own copy."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pyseq._capture import arguments, untouched

OUTSIDE = -1


class PerCall(nn.Module):
    """Stands for a module that is called n times in a forward of the root model: the i-th call goes to the i-th copy.

    copies: one for each call, as children "0" to "n-1"; the same module several times where calls share one.
    Hooks that `attach` puts on the root begin the count anew in each of its forwards. Takes and returns what a copy
    does. Raises RuntimeError for a call outside of a forward of the root, or for one more than n.
    """

    def __init__(self, copies: Iterable[nn.Module]) -> None:
        super().__init__()
        for i, module in enumerate(copies):
            self.add_module(str(i), module)
        self._call = OUTSIDE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call == OUTSIDE:
            raise RuntimeError(
                f"which of {len(self)} copies is meant is known only inside a forward of the model that was un-shared: "
                "call that model itself, not its parts or its methods; checkpoint it as a whole "
                "(torch.utils.checkpoint runs parts again outside of its forward); or call one copy, by its index"
            )
        if call >= len(self):
            raise RuntimeError(_other_count(f"more than {len(self)}", len(self)))
        self._call = call + 1
        return self._modules[str(call)](*args, **kwargs)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, call: int) -> nn.Module:
        return [*self._modules.values()][call]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"an un-shared module has a copy for each call and no {name!r} of its own: take a copy's, by its index"
            ) from None


def _other_count(got: object, wanted: int) -> str:
    return (
        f"the number of calls depends on the data: got {got} calls of an un-shared module in this forward, wanted "
        f"{wanted} as with the example; un-share only modules that are called equally often every time"
    )


class _Hook:
    """On the root, for the PerCall modules at these paths; without references, so that copies and pickles are right.

    Tensors stay in a tuple: torch.compile, which may trace a hook alone, warns of those that are its locals.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths

    def places(self, root: nn.Module) -> list[Any]:
        return [root.get_submodule(path) for path in self.paths]


class _Begin(_Hook):
    def __call__(self, root: nn.Module, *_: Any) -> None:
        for place in self.places(root):
            place._call = 0


class _Check(_Hook):
    def __call__(self, root: nn.Module, *_: Any) -> None:
        for place in self.places(root):
            if place._call != len(place):
                raise RuntimeError(_other_count(place._call, len(place)))


class _End(_Hook):
    def __call__(self, root: nn.Module, *_: Any) -> None:
        for place in self.places(root):
            place._call = OUTSIDE


def attach(root: nn.Module, paths: Iterable[str]) -> None:
    """Hooks on root that count calls of the PerCall modules at these paths, beside those that have them already."""
    every = (*detach(root), *paths)
    if every:
        root.register_forward_pre_hook(_Begin(every), prepend=True)
        root.register_forward_hook(_Check(every))
        root.register_forward_hook(_End(every), always_call=True)


def detach(root: nn.Module) -> tuple[str, ...]:
    """Remove these hooks; the paths that they served."""
    paths: tuple[str, ...] = ()
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key, hook in [*hooks.items()]:
            if isinstance(hook, _Hook):
                paths = hook.paths
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)
    return paths


class _Count:
    def __init__(self) -> None:
        self.calls: dict[nn.Module, int] = {}

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1


def count_calls(model: nn.Module, example: Any) -> list[tuple[str, int]]:
    """Paths of the modules that one forward calls, in the order of their first calls, each with its number of calls.

    example: a tuple of arguments, a dict of keyword arguments, or one tensor. A module with several names goes by the
    first one. The forward runs without gradients and in the modes the model is in; afterwards buffers, hooks and
    random numbers are as before. Raises TypeError for another kind of example, and what the forward raises.

    >>> relu = nn.ReLU()
    >>> count_calls(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), torch.ones(1, 2))
    [('', 1), ('0', 1), ('1', 2), ('2', 1)]
    """
    args, kwargs = arguments(model, example)
    names, count = {module: name for name, module in model.named_modules()}, _Count()
    handles = [module.register_forward_pre_hook(count) for module in names]
    try:
        with untouched(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [(names[module], n) for module, n in count.calls.items()]
