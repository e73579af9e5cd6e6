"""Lookahead: slow weights that follow any optimizer's fast ones at a distance."""

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyseq.kernels.lookahead import Pairs
from pyseq.ops import _lookahead

Momentum = Literal["keep", "reset", "pullback"]
OURS = "lookahead_"  # begins the names of what we keep in a parameter's state and in groups
PLAIN = {Tensor, torch.nn.Parameter}
SLOW, STEP, K, ALPHA = (OURS + name for name in ("slow", "step", "k", "alpha"))


class Lookahead(Optimizer):
    """Wraps an optimizer; after every k-th step slow weights move towards the fast ones, which start again from there.

    slow := slow + alpha (fast - slow), then fast := slow. Slow weights are the weights before the first step, and taken
    again as long as no step was made, so that weights may be loaded or moved; `restart()` takes them anew later.

    optimizer: any torch optimizer, kept as `.optimizer`, whose parameters are real and floating. k: steps between
    synchronisations, at least 1. alpha: in [0, 1]. Groups may have their own `lookahead_k` and `lookahead_alpha`.
    momentum: what happens then to the inner optimizer's state. "keep": nothing. "reset": it is as a fresh one's.
    "pullback": its tensors of a parameter's shape (momentum_buffer, exp_avg, exp_avg_sq, ...) move as the weights do,
    from zero at first; step counts stay.

    Parameter groups are the inner optimizer's own, so schedulers reach them. `state` is a view of its state and, under
    names that begin with `lookahead_`, of ours. Every kind of checkpoint resumes exactly in mid-cycle, also
    torch.distributed.checkpoint from a fresh object; a plain optimizer's state is loaded before wrapping it.
    Slow weights are float32 for half precision parameters and keep it when loaded. Under GradScaler skipped steps do
    not count; a fused inner optimizer is unscaled by the scaler.

    Memory: one copy of the weights; "pullback" one of each tensor of state, too. Time: one pass over both in k steps.
    Raises TypeError for what is no optimizer, a Lookahead, or has complex or integer parameters; ValueError for k,
    alpha or momentum out of range. Source: Zhang, Lucas, Hinton and Ba 2019, "Lookahead Optimizer".

    >>> weight = torch.nn.Parameter(torch.tensor(4.0))
    >>> opt = optim.Lookahead(torch.optim.SGD([weight], lr=0.1), k=3, alpha=0.5)
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     (weight**2).backward()
    ...     opt.step()
    >>> weight.item()  # of 4 and 2.048, the mean
    3.0239999294281006
    """

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5, momentum: Momentum = "keep") -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Lookahead):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer to be wrapped once, got {_name(optimizer)}")
        if momentum not in ("keep", "reset", "pullback"):
            raise ValueError(f"momentum must be 'keep', 'reset' or 'pullback', got {momentum!r}")
        super().__init__([{"params": []}], {})  # hooks; the groups are the inner optimizer's
        for group in optimizer.param_groups:
            _settle(group, k, alpha, 0)
        self.momentum, self.defaults = momentum, optimizer.defaults
        self._k, self._alpha = k, alpha
        self._kept: dict[Tensor, dict[str, Tensor]] = {}  # slow weights and, for pullback, slow momenta
        self._shown = False  # the inner state was made to be looked at
        self._fresh = _fresh_state(optimizer) if momentum == "reset" and optimizer.state else {}
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state of each parameter, and ours; before the first step as they begin."""
        if not self._kept:
            self._make_state()
            self._take()
            self._take_momenta(self.param_groups)
        return _Merged(self.optimizer.state, self._kept)

    @state.setter
    def state(self, state: Any) -> None:
        if "optimizer" in self.__dict__:
            self.__setstate__({"state": state, "param_groups": self.param_groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the inner optimizer; its slow weights are its weights of now."""
        if "optimizer" in self.__dict__:
            groups = self.param_groups
            clock = groups[0][STEP]
            self.optimizer.add_param_group(param_group)
            try:
                _settle(groups[-1], self._k, self._alpha, clock)
            except (TypeError, ValueError):
                groups.pop()
                raise
            for p in groups[-1]["params"]:
                self._kept.pop(p, None)
            self._take(groups[-1:])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the inner optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def restart(self) -> None:
        """Start a cycle here: the slow weights will be the weights before the next step."""
        for group in self.param_groups:
            group[STEP] = 0
        self._kept, self._shown = {}, False

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # the inner optimizer's is compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, and of the slow weights after every k-th one. Returns the closure's loss."""
        inner, groups = self.optimizer, self.param_groups
        clock = groups[0].get(STEP, 0)
        if clock == 0:
            if self._shown:  # the first step makes its own
                inner.state.clear()
            self._kept, self._shown = {}, False
            self._take()
        loss = inner.step() if closure is None else inner.step(closure)
        if clock == 0:
            self._take_momenta(groups)
        for group in groups:
            group[STEP] = clock + 1
        self._synchronise([group for group in groups if (clock + 1) % group.setdefault(K, self._k) == 0])
        return loss

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Inside the block parameters hold the slow weights, for evaluation; behind it the fast ones, bit for bit.

        Also after an exception. A step inside raises RuntimeError. Memory: one more copy of the weights.
        """
        moved = self._kept if self.param_groups[0][STEP] else {}  # before the first step there is but one kind
        pairs = [(p, kept[SLOW]) for p, kept in moved.items()]
        with torch.no_grad():
            fast = [p.clone() for p, _ in pairs]
            for p, slow in pairs:
                p.copy_(slow)
        forbid = self.register_step_pre_hook(_forbid)
        try:
            yield
        finally:
            forbid.remove()
            with torch.no_grad():
                for (p, _), x in zip(pairs, fast, strict=True):
                    p.copy_(x)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a Lookahead around the same kind of optimizer; ValueError for another one, and nothing is loaded then."""
        guard = self.register_load_state_dict_pre_hook(_checked)  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            guard.remove()

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "momentum", "defaults", "_k", "_alpha", "_kept", "_shown", "_fresh")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:  # a copy, or out of a pickle
            super().__setstate__(state)
            return
        inner: dict[Any, Any] = defaultdict(dict)
        self._kept, self._shown = {}, False
        for p, entries in state["state"].items():
            for name, x in entries.items():
                if not name.startswith(OURS):
                    inner[p][name] = x
                else:
                    x = x.tensor.to(p.device, copy=True) if isinstance(x, _AsItIs) else x
                    self._kept.setdefault(p, {})[name] = x
        self.optimizer.__setstate__({"state": inner, "param_groups": state["param_groups"]})

    def _take(self, groups: list[dict[str, Any]] | None = None) -> None:
        """Slow weights where there are none."""
        for group in self.param_groups if groups is None else groups:
            for p in group["params"]:
                if p not in self._kept:
                    self._kept[p] = {SLOW: p.detach().to(_wide(p), copy=True)}

    def _take_momenta(self, groups: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        """The inner optimizer's momenta, each beside what it is pulled back to; none unless asked for."""
        pairs = []
        for p in (p for group in groups for p in group["params"] if self.momentum == "pullback"):
            for name, x in self.optimizer.state.get(p, {}).items():
                if isinstance(x, Tensor) and x.shape == p.shape and x.is_floating_point() and name != "step":
                    last = self._kept[p].get(OURS + name)
                    if last is None:
                        last = self._kept[p][OURS + name] = torch.zeros_like(x, dtype=_wide(x))
                    pairs.append((x, last))
        return pairs

    def _synchronise(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            params: list[Tensor] = group["params"]
            kept = [self._kept.get(p) for p in params]
            if None in kept or [p.device for p in params] != [k[SLOW].device for k in kept]:  # type: ignore[index]
                self._follow(group)
                kept = [self._kept[p] for p in params]
            momenta = self._take_momenta([group])
            fast = params + [x for x, _ in momenta]
            slow = [k[SLOW] for k in kept] + [last for _, last in momenta]  # type: ignore[index]
            if not PLAIN.issuperset(map(type, fast)):
                fast, slow = ([_local(x) for x in each] for each in (fast, slow))
            devices = [x.device for x in fast]
            for device in {*devices}:
                on = [device == x for x in devices]
                pairs = Pairs([*compress(fast, on)], [*compress(slow, on)])
                _lookahead.update(pairs, group.setdefault(ALPHA, self._alpha))
            if self.momentum == "reset":
                self._reset(params)

    def _follow(self, group: dict[str, Any]) -> None:
        """Slow weights of parameters that were put there past us, and to where the module was moved."""
        self._take([group])
        for p in group["params"]:
            self._kept[p] = {name: x.to(p.device) for name, x in self._kept[p].items()}

    def _reset(self, params: list[Tensor]) -> None:
        for p in params:
            self.optimizer.state.pop(p, None)
            if p in self._fresh:
                copies = {k: x.clone() if isinstance(x, Tensor) else x for k, x in self._fresh[p].items()}
                self.optimizer.state[p] = copies

    def _make_state(self) -> None:
        """The inner optimizer's state as its first step will begin, where it makes it only then: by a step of a copy,
        on copies of the parameters, with gradients of zero."""
        inner = self.optimizer
        if inner.state:
            return
        originals: dict[Tensor, Tensor] = {}
        groups = []
        for group in inner.param_groups:
            params = [p.detach().clone().requires_grad_(p.requires_grad) for p in group["params"]]
            originals |= zip(params, group["params"], strict=True)
            groups.append({**group, "params": params, **({"weight_decay": 0.0} if "weight_decay" in group else {})})
        for p in originals:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
                if isinstance(inner, torch.optim.SparseAdam):
                    p.grad = p.grad.to_sparse()
        twin = copy.copy(inner)
        twin.__setstate__({"state": defaultdict(dict), "param_groups": groups})
        try:
            twin.step()
        except Exception:  # it needs a closure, or more: it shows its state once it was stepped
            return
        for p, entries in twin.state.items():
            for name, begin in (("step", 0), ("mu_product", 1)):
                if isinstance(x := entries.get(name), Tensor):
                    x.fill_(begin)
                elif x is not None:
                    entries[name] = begin
            inner.state[originals[p]] = entries
        self._shown = True


class _Merged(Mapping[Tensor, dict[str, Any]]):
    """What two mappings say of each parameter."""

    def __init__(self, *parts: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self.parts = parts

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        found = [part[p] for part in self.parts if p in part]
        if not found:
            raise KeyError(p)
        return {name: x for each in found for name, x in each.items()}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(dict.fromkeys(p for part in self.parts for p in part))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _AsItIs:
    """A tensor that torch's load_state_dict does not round to its parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _checked(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The dict with our tensors protected, or ValueError."""
    assert isinstance(opt, Lookahead)
    saved, groups = state_dict["param_groups"], opt.param_groups
    if any(STEP not in group for group in saved):
        raise ValueError(
            "this is no Lookahead's state; load a plain optimizer's into the inner one, before wrapping it"
        )
    for ours, theirs in zip(groups, saved, strict=False):  # torch says what else is wrong with groups
        if {*ours} - {*theirs} and {*theirs} - {*ours}:
            strange = ", ".join(sorted({*theirs} - {*ours}))
            raise ValueError(f"this is the state of another optimizer than {_name(opt.optimizer)}: it has {strange}")
    index = {i: p for a, b in zip(saved, groups, strict=False) for i, p in zip(a["params"], b["params"], strict=False)}
    state: dict[Any, dict[str, Any]] = {}
    for i, entries in state_dict["state"].items():
        p, state[i] = index.get(i), dict(entries)
        for name, x in entries.items():
            if p is not None and name.startswith(OURS) and isinstance(x, Tensor):
                if x.shape != p.shape:
                    raise ValueError(f"{name} of parameter {i} has shape {tuple(x.shape)}, wanted {tuple(p.shape)}")
                state[i][name] = _AsItIs(x)
    return {**state_dict, "state": state}


def _settle(group: dict[str, Any], k: int, alpha: float, clock: int) -> None:
    k, alpha = group.setdefault(K, k), group.setdefault(ALPHA, alpha)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number in [0, 1], got {alpha!r}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"parameters must be real and floating, got one of {p.dtype}")
    group[STEP] = clock


def _fresh_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Of an optimizer that makes its state when it is constructed: the state of another one of its kind."""
    wanted = inspect.signature(type(optimizer)).parameters
    defaults = {name: x for name, x in optimizer.defaults.items() if name in wanted}
    again = type(optimizer)([dict(group) for group in optimizer.param_groups], **defaults)
    return dict(again.state)


def _forbid(*_: Any) -> None:
    raise RuntimeError("no step inside slow_weights(): the parameters hold the slow weights")


def _wide(x: Tensor) -> torch.dtype:
    """Of a slow copy."""
    return torch.promote_types(x.dtype, torch.float32)


def _local(x: Tensor) -> Tensor:
    """This process's part of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[no-any-return]


def _name(x: object) -> str:
    return type(x).__name__
