"""Any optimizer, with embedding rows that a step has not seen left as they are."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pyseq.optim._state import AsItIs, Merged, Wrapper, name_of, same_kind, state_like

Mode = Literal["index", "zero"]
TOUCHES = "lazy_touches"


class Lazy(Wrapper):
    """Wraps an optimizer; weights of the embeddings' rows that a step has not seen stay as they are.

    The inner optimizer makes its step, and moments of all rows fade in it as ever; then the rows that were not seen get
    their weights back. So momentum does not move a rare word in every step. A step costs a copy of the tables;
    `LazyAdam` with semantics="decay" gives Adam's result without.

    optimizer: any torch optimizer with one step a call, kept as `.optimizer`. modules: `nn.Embedding`s or
    `nn.EmbeddingBag`s whose weights it has; sparse gradients are as good as dense ones to those that take them.
    mode: which rows are seen. "index": those that the modules looked up, but for padding_idx, in a forward pass with
    gradients on, and that a backward pass reached since the last step or `zero_grad()`; also rows whose gradient is 0.
    "zero": those whose gradient is not all zero. A penalty on the table, or an output layer that is tied to it, gives
    every row a gradient, and half precision may give none; then only "index" is right.
    count_rows: whether to count how often each row was seen, for `row_report`.

    Ranks of the default process group see in "index" mode what any of them has seen, by one all_reduce of a byte a row.
    Parameter groups and state are the inner optimizer's own. Memory: a copy of the tables for the time of a step, in
    "index" mode two bytes a row. Time: one pass over the tables more.
    Raises TypeError for what is no optimizer or embedding, ValueError for no embeddings, and for a weight that the
    optimizer does not have. Warns, on the CPU, where a table has a gradient and no row was looked up.
    Source: Su 2019, "Keras implementation of the Lazy optimizer", the idea of "zero".

    >>> words = torch.nn.Embedding(1000, 8)
    >>> opt = optim.Lazy(torch.optim.Adam(words.parameters(), lr=0.01), [words])
    >>> before = words.weight.detach().clone()
    >>> words(torch.tensor([3, 7])).sum().backward()
    >>> opt.step()
    >>> (words.weight != before).any(1).nonzero().view(-1).tolist()
    [3, 7]
    """

    def __init__(
        self, optimizer: Optimizer, modules: Iterable[nn.Module], mode: Mode = "index", *, count_rows: bool = False
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Wrapper):
            wanted = "an optimizer such as torch.optim.Adam(model.parameters()), wrapped by nothing yet"
            raise TypeError(f"optimizer must be {wanted}, got {name_of(optimizer)}")
        if mode not in ("index", "zero"):
            raise ValueError(f"mode must be 'index' or 'zero', got {mode!r}")
        embeddings: list[nn.Embedding | nn.EmbeddingBag] = []
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for i, module in enumerate([modules] if isinstance(modules, nn.Module) else modules):
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                raise TypeError(f"modules must be of nn.Embedding or nn.EmbeddingBag, got {name_of(module)}")
            embeddings.append(module)
            if module.weight not in own:
                raise ValueError(f"the optimizer does not have the weight of modules[{i}], {module}")
        if not embeddings:
            raise ValueError("modules must name an embedding at least; a generator can be used up")
        super().__init__([{"params": []}], {})  # hooks; the groups are the inner optimizer's
        self.optimizer, self.defaults = optimizer, optimizer.defaults
        self.mode, self.count_rows = mode, bool(count_rows)
        self.moved: dict[Tensor, Tensor] = {}  # bool (rows,): seen by the last step
        self._loading: dict[str, Any] = {}
        weights = dict.fromkeys(module.weight for module in embeddings)
        self.counts = {p: torch.zeros(p.size(0) + 1, dtype=torch.int32) for p in weights if count_rows}  # and of steps
        self._seen = {p: _Seen(p) if mode == "index" else None for p in weights}
        for module in embeddings if mode == "index" else []:
            for number in [n for n, hook in module._forward_hooks.items() if isinstance(hook, _Seen)]:
                module._forward_hooks_with_kwargs.pop(number, None)
                del module._forward_hooks[number]  # of an optimizer that was here before
            module.register_forward_hook(self._seen[module.weight], with_kwargs=True)  # type: ignore[arg-type]
        self._listen()

    @property
    def state(self) -> Any:
        """The inner optimizer's, with the counts."""
        inner = self.optimizer.state
        if not self.count_rows:
            return inner
        return Merged(inner, {p: {TOUCHES: x} for p, x in self.counts.items() if p in inner})

    @state.setter
    def state(self, state: Any) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the inner optimizer."""
        if "optimizer" in self.__dict__:
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the inner optimizer; what backward passes have reached is forgotten."""
        super().zero_grad(set_to_none)
        for seen in self._seen.values():
            if seen is not None:
                seen.reached.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer. Returns the closure's loss."""
        tables = [p for p in self._seen if closure is not None or p.grad is not None]
        if any(hasattr(p, "to_local") for p in tables):
            raise TypeError("a table that is sharded over processes (DTensor) cannot be lazy; leave it out of modules")
        before = {p: p.clone() for p in tables}
        self._warn(tables)
        if closure is None:
            loss = self.optimizer.step()
        else:
            with torch.enable_grad():
                loss = self.optimizer.step(closure)
        self.moved = {p: torch.zeros(p.size(0), dtype=torch.bool, device=p.device) for p in self._seen}
        for p, old in before.items():
            rows = self.moved[p] = self._rows(p)
            p.copy_(torch.where(rows.unsqueeze(1), p, old))
            if self.count_rows:
                self.counts[p] = self.counts[p].to(p.device)
                self.counts[p][:-1] += rows
                self.counts[p][-1] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the same kind of optimizer, in a Lazy or alone, else ValueError; what else torch says of it."""
        state_like(state_dict)
        guard = self.register_load_state_dict_pre_hook(_keep)  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            guard.remove()
            self._loading = {}

    def __getstate__(self) -> dict[str, Any]:
        shared = ("optimizer", "defaults", "mode", "count_rows", "counts", "_seen", "_loading")
        return {name: self.__dict__[name] for name in shared} | {"moved": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:  # a copy, or out of a pickle
            super().__setstate__(state)
            self._listen()
            return
        entries: Mapping[Any, Any] = self._loading["state"]
        inner = {i: {k: x for k, x in e.items() if k != TOUCHES} for i, e in entries.items()}
        self.optimizer.load_state_dict({**self._loading, "state": inner})
        saved = [i for group in self._loading["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if p in self.counts and TOUCHES in entries.get(i, {}):
                self.counts[p] = AsItIs(entries[i][TOUCHES]).on(p.device)

    def _listen(self) -> None:
        for p, seen in self._seen.items():
            if seen is not None:
                wanted = p.requires_grad
                p.requires_grad_()  # else torch takes no hook; it may be thawed later
                p.register_post_accumulate_grad_hook(seen.reach)
                p.requires_grad_(wanted)

    def _warn(self, tables: list[Tensor]) -> None:
        """Where it costs nothing to see that hooks do not run."""
        for p in tables:
            seen, grad = self._seen[p], p.grad
            if seen is None or grad is None or not p.is_cpu or seen.reached.any():
                continue
            if (grad._values() if grad.is_sparse else grad).any():
                warnings.warn(
                    "a table has a gradient, but none of its rows was looked up, so none moves: was the model compiled "
                    "before Lazy was made (torch.compiler.reset()), another Lazy made for its modules, or the gradient "
                    "not made by backward()? mode='zero' needs no hooks",
                    stacklevel=4,
                )

    def _rows(self, p: Tensor) -> Tensor:
        """bool (rows,): of this step."""
        seen = self._seen[p]
        if seen is None:
            if p.grad is None:
                return torch.zeros(p.size(0), dtype=torch.bool, device=p.device)
            if not p.grad.is_sparse:
                return (p.grad != 0).any(1)
            grad = p.grad.coalesce()
            rows = torch.zeros(p.size(0), dtype=torch.bool, device=p.device)
            return rows.index_copy_(0, grad.indices()[0], (grad.values() != 0).any(1))
        rows = seen.reached.to(p.device, copy=True)
        seen.reached.zero_()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shared = rows.to(torch.uint8)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            rows = shared.bool()
        return rows


class _Seen:
    """A forward hook of embeddings that share a weight; it knows nothing of the optimizer, for modules are copied."""

    def __init__(self, weight: Tensor) -> None:
        self.looked_up = torch.zeros(weight.size(0), dtype=torch.bool, device=weight.device)
        self.reached = self.looked_up.clone()  # by a backward pass

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if not torch.is_grad_enabled():
            return
        rows = (args[0] if args else kwargs["input"]).reshape(-1)
        if self.looked_up.device != rows.device:
            self.looked_up, self.reached = self.looked_up.to(rows.device), self.reached.to(rows.device)
        pad = module.padding_idx
        padded = None if pad is None else self.looked_up[pad].clone()
        self.looked_up.index_fill_(0, rows.long(), True)
        if padded is not None:
            self.looked_up[pad] = padded

    def reach(self, _: Tensor) -> None:
        self.reached |= self.looked_up
        self.looked_up.zero_()


def _keep(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The dict without state, which is put aside for the inner optimizer."""
    assert isinstance(opt, Lazy)
    for ours, theirs in zip(opt.param_groups, state_dict["param_groups"], strict=False):
        same_kind(opt.optimizer, ours, theirs)
    opt._loading = state_dict
    return {**state_dict, "state": {}}
