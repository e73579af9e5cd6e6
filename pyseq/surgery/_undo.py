"""What an edit changed, and the way back."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pyseq.surgery._calls import attach


class Absent:
    """Stands for what is not there."""


class Place(NamedTuple):
    """An attribute of a module, what it held before the edit and what the edit put there."""

    owner: nn.Module
    name: str
    before: Any
    after: Any

    def moved(self) -> bool:
        """Whether something else has happened to it since; what was appended must still be the last."""
        if getattr(self.owner, self.name, Absent) is not self.after:
            return True
        return self.before is Absent and [*self.owner._modules][-1] != self.name


class Edit:
    """What one edit of a model changed, and the way back; `str()` says it.

    names: what was edited. parameters: how many numbers the model's parameters hold, before and after. shapes: what the
    edited places gave in the probe before and after, a tuple of shapes for each call, or None without an example.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> from pyseq import surgery
    >>> edit = surgery.replace(model, "1", torch.nn.Tanh(), example=torch.ones(1, 2))
    >>> print(edit)
    replace 1: ReLU -> Tanh; parameters 9 -> 9; shapes (1, 3) -> (1, 3)
    >>> edit.undo()
    >>> model[1]
    ReLU()
    """

    def __init__(self, what: str, names: tuple[str, ...]) -> None:
        self.what, self.names = what, names
        self.parameters = (0, 0)
        self.shapes: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
        self._places: list[Place] = []
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._counted: list[tuple[dict[int, Any], dict[int, Any], set[int]]] = []
        self._undone = False

    def undo(self) -> None:
        """Make the model what it was before the edit: modules, parameters, their order, hooks, training flags.

        Raises RuntimeError where that is done already, or a place no longer holds what the edit put there, as when a
        later edit is not undone yet; nothing is changed then.

        >>> from pyseq import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> surgery.remove(model, "1").undo()
        >>> model[1]
        ReLU()
        """
        if self._undone:
            raise RuntimeError(f"this edit is undone already: {self}")
        moved = {place.name for place in self._places if place.moved()}
        moved |= {"the hook" for owner, handle in self._hooks if handle.id not in owner._forward_hooks}
        if moved:
            raise RuntimeError(
                f"cannot undo: {', '.join(sorted(moved))} changed since this edit: undo the later edits first, the last"
                f" one first. The edit: {self}"
            )
        self._restore()

    def _restore(self) -> None:
        """Undo without a check, for an edit that fails."""
        for owner, name, before, _ in reversed(self._places):
            if before is Absent:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for _, handle in self._hooks:
            handle.remove()
        for hooks, before, added in self._counted:
            kept = {key: hook for key, hook in hooks.items() if key not in added}
            hooks.clear()
            hooks.update({**before, **kept})
        for module, mode in reversed(self._modes):
            module.training = mode
        self._undone = True

    def _put(self, owner: nn.Module, name: str, value: Any) -> None:
        """Let the owner hold value under name."""
        before = getattr(owner, name, Absent)
        setattr(owner, name, value)
        self._places.append(Place(owner, name, before, value))

    def _hook(self, owner: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward hook."""
        self._hooks.append((owner, owner.register_forward_hook(hook)))

    def _count(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Let the model count the calls of PerCall modules at these paths."""
        tables: Any = (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called)
        before = [{**hooks} for hooks in tables]
        attach(model, paths)
        self._counted += [(now, old, {*now} - {*old}) for now, old in zip(tables, before, strict=True)]

    def _follows(self, first: "Edit") -> "Edit":
        """The edit as one with what was done for it."""
        self._places[:0], self._counted[:0] = first._places, first._counted
        return self

    def _mode(self, module: nn.Module, training: bool) -> None:
        """Set the training flag of this module alone."""
        self._modes.append((module, module.training))
        module.training = training

    def __str__(self) -> str:
        before, after = self.parameters
        text = f"{self.what}; parameters {before:,} -> {after:,}"
        if self.shapes is not None:
            old, new = (", ".join(dict.fromkeys(map(str, shapes))) or "none" for shapes in self.shapes)
            text += f"; shapes {old} -> {new}"
        return text + ("; undone" if self._undone else "")

    def __repr__(self) -> str:
        return f"<Edit: {self}>"


def short(names: tuple[str, ...]) -> str:
    """Names, where they are many the first two and the last."""
    return ", ".join(names if len(names) <= 4 else (*names[:2], f"... ({len(names)} names)", names[-1]))


def count(*models: nn.Module) -> int:
    """Numbers in the parameters, each parameter once."""
    unique = {id(p): p for model in models for p in model.parameters() if not is_lazy(p)}
    return sum(p.numel() for p in unique.values())
