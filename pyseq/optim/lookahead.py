"""Lookahead: slow weights that follow any optimizer's fast ones at a distance."""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import compress
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyseq.kernels.lookahead import Pairs
from pyseq.ops import _lookahead
from pyseq.optim._rows import Moved
from pyseq.optim._state import AsItIs, Merged, Wrapper, innermost, name_of, same_kind, state_like

Momentum = Literal["keep", "reset", "pullback"]
SLOW, STEP, K, ALPHA, SHOWN = (f"lookahead_{name}" for name in ("slow", "step", "k", "alpha", "shown"))
OF = f"{SLOW}_"  # begins the names of slow momenta
PLAIN = {Tensor, torch.nn.Parameter}


class Lookahead(Wrapper):
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

    Memory: one copy of the weights; "pullback" one of each tensor of state, too. Time: one pass over both in k steps;
    of tables in a lazy optimizer on the CPU over the rows that moved.
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

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5, momentum: Momentum = "keep") -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Lookahead):
            wanted = "an optimizer such as torch.optim.Adam(model.parameters()), no Lookahead"
            raise TypeError(f"optimizer must be {wanted}, got {name_of(optimizer)}")
        if momentum not in ("keep", "reset", "pullback"):
            raise ValueError(f"momentum must be 'keep', 'reset' or 'pullback', got {momentum!r}")
        super().__init__([{"params": []}], {})  # hooks; the groups are the inner optimizer's
        for group in optimizer.param_groups:
            if STEP in group:  # was wrapped before
                group.pop(K, None)
                group.pop(ALPHA, None)
            _settle(group, k, alpha)
            group[STEP] = group[SHOWN] = 0
        self.momentum, self.defaults = momentum, optimizer.defaults
        self._k, self._alpha = k, alpha
        self._kept: dict[Tensor, dict[str, Tensor]] = {}  # slow weights and, for pullback, slow momenta
        self._stepping, self._moved = False, Moved()
        self._loading: dict[str, Any] = {}
        self._fresh = _fresh_state(innermost(optimizer)) if momentum == "reset" and optimizer.state else {}
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        """The inner optimizer's state of each parameter, and ours; before the first step as they begin."""
        if not self._stepping and (not self._kept or self.momentum == "reset"):
            self._make_state()
            self._take(self.param_groups)
            self._take_momenta(self.param_groups)
        return Merged(self.optimizer.state, self._kept)

    @state.setter
    def state(self, state: Any) -> None:
        if "optimizer" in self.__dict__:
            raise TypeError("this is a view; change opt.optimizer.state, or load a state dict")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the inner optimizer; its slow weights are its weights of now."""
        if "optimizer" in self.__dict__:
            groups = self.param_groups
            clock = groups[0][STEP]
            self.optimizer.add_param_group(param_group)
            try:
                _settle(groups[-1], self._k, self._alpha)
            except (TypeError, ValueError):
                groups.pop()
                raise
            groups[-1] |= {STEP: clock, SHOWN: 0}
            for p in groups[-1]["params"]:
                self._kept.pop(p, None)
            self._take(groups[-1:])

    def restart(self) -> None:
        """Start a cycle here: the slow weights will be the weights before the next step."""
        for group in self.param_groups:
            group[STEP] = 0
        self._kept, self._moved = {}, Moved()

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # the inner optimizer's is compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, and of the slow weights after every k-th one. Returns the closure's loss."""
        inner, groups = self.optimizer, self.param_groups
        clock = groups[0].get(STEP, 0)
        self._stepping = True  # nobody who looks at the state now is to be shown more than there is
        try:
            for group in groups:
                if group.get(SHOWN):  # a step makes its own
                    self._reset(group)
                    group[SHOWN] = 0
            if clock == 0:
                self._kept, self._moved = {}, Moved()
                self._take(groups)
            for group in groups:
                _settle(group, self._k, self._alpha)
            due = [group for group in groups if (clock + 1) % group[K] == 0]
            for group in due:
                self._follow(group)
            if self.momentum == "keep":
                self._moved.before(inner, groups)
            loss = inner.step() if closure is None else inner.step(closure)
            self._moved.after(inner, closure is not None)
            if clock == 0:
                self._take_momenta(groups)
            for group in groups:
                group[STEP] = clock + 1
            for group in due:
                self._synchronise(group)
        finally:
            self._stepping = False
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

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's own, with our entries beside its."""
        guard = self.register_state_dict_post_hook(_with_inner, prepend=True)  # before the user's
        try:
            return super().state_dict()
        finally:
            guard.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a Lookahead around the same kind of optimizer; ValueError for another one, and nothing is loaded then.

        Groups come with their k and alpha; the momentum mode is this object's.
        """
        state_like(state_dict)
        guard = self.register_load_state_dict_pre_hook(_split)  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            guard.remove()
            self._loading = {}

    def __getstate__(self) -> dict[str, Any]:
        shared = ("optimizer", "momentum", "defaults")
        return {name: x for name, x in self.__dict__.items() if name in shared or name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:  # a copy, or out of a pickle
            super().__setstate__(state)
            self._moved = Moved()
            return
        kept = {p: {name: x.on(p.device) for name, x in e.items()} for p, e in state["state"].items()}
        self.optimizer.load_state_dict(self._loading)
        self._kept, self._moved = kept, Moved()

    def _take(self, groups: list[dict[str, Any]]) -> None:
        """Slow weights where there are none."""
        for p in (p for group in groups for p in group["params"]):
            if p not in self._kept:
                self._kept[p] = {SLOW: p.detach().to(_wide(p), copy=True)}

    def _take_momenta(self, groups: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        """The inner optimizer's momenta, each beside what it is pulled back to; none unless asked for."""
        pairs = []
        for p in (p for group in groups for p in group["params"] if self.momentum == "pullback"):
            for name, x in self.optimizer.state.get(p, {}).items():
                if isinstance(x, Tensor) and x.shape == p.shape and x.is_floating_point() and name != "step":
                    last = self._kept[p].get(OF + name)
                    if last is None:
                        last = self._kept[p][OF + name] = torch.zeros_like(x, dtype=_wide(x))
                    pairs.append((x, last))
        return pairs

    def _follow(self, group: dict[str, Any]) -> None:
        """Slow weights of parameters that were put there past us, and as the module is now; TypeError where one cannot
        have any."""
        params = group["params"]
        kept = [self._kept.get(p) for p in params]
        if None in kept or any(_unlike(p, k[SLOW]) for p, k in zip(params, kept, strict=True)):  # type: ignore[index]
            _floating(params)
            self._take([group])
            for p in params:
                self._kept[p] = {name: x.to(p.device, _wide(p)) for name, x in self._kept[p].items()}

    def _synchronise(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        rows = {p: self._moved.take(p) for p in params}
        few = [(p.detach(), self._kept[p][SLOW], r) for p, r in rows.items() if r is not None]
        parts = [(p[r], slow[r]) for p, slow, r in few]
        pairs = [(p, self._kept[p][SLOW]) for p in params if rows[p] is None] + self._take_momenta([group]) + parts
        fast, slow = [x for x, _ in pairs], [x for _, x in pairs]
        if not PLAIN.issuperset(map(type, fast)):
            fast, slow = ([_local(x) for x in each] for each in (fast, slow))
        devices = [x.device for x in fast]
        for device in {*devices}:
            on = [device == x for x in devices]
            _lookahead.update(Pairs([*compress(fast, on)], [*compress(slow, on)]), group[ALPHA])
        for (p, kept, r), (x, y) in zip(few, parts, strict=True):
            p.index_copy_(0, r, x)
            kept.index_copy_(0, r, y)
        for p in params:
            self._moved.settled(p)
        if self.momentum == "reset":
            self._reset(group)

    def _reset(self, group: dict[str, Any]) -> None:
        """Also the count of steps that some optimizers keep in the group."""
        inner = innermost(self.optimizer)
        if "step" in group:
            group.pop("step")
            group.update({"step": inner.defaults["step"]} if "step" in inner.defaults else {})
        for p in group["params"]:
            inner.state.pop(p, None)
            if p in self._fresh:
                inner.state[p] = {k: x.clone() if isinstance(x, Tensor) else x for k, x in self._fresh[p].items()}

    def _make_state(self) -> None:
        """The inner optimizer's state as its next step will begin, where it makes it only then: by a step of a copy, on
        copies of the parameters, with gradients of zero."""
        inner = innermost(self.optimizer)
        given = [g for g in inner.param_groups if not any(p in inner.state for p in g["params"])]
        originals: dict[Tensor, Tensor] = {}
        groups = []
        for group in given:
            params = [p.detach().clone().requires_grad_(p.requires_grad) for p in group["params"]]
            originals |= zip(params, group["params"], strict=True)
            groups.append({**group, "params": params, **({"weight_decay": 0.0} if "weight_decay" in group else {})})
        for p in originals:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
                if isinstance(inner, torch.optim.SparseAdam):
                    p.grad = p.grad.to_sparse()
        twin = object.__new__(type(inner))  # without hooks, and without what a scheduler puts for `step`
        twin.__dict__ |= {k: x for k, x in inner.__dict__.items() if k != "step" and not k.endswith("_hooks")}
        try:
            twin.__setstate__({"state": defaultdict(dict), "param_groups": groups})
            twin.step()
        except Exception:  # it needs a closure, or more: it shows its state once it was stepped
            return
        for p, entries in twin.state.items():
            if p in originals:
                inner.state[originals[p]] = {name: _at_first(name, x) for name, x in entries.items()}
        for group, stepped in zip(given, groups, strict=True):
            group[SHOWN] = 1  # also for whoever loads it
            if "step" in stepped and "step" not in group:
                group["step"] = _at_first("step", stepped["step"])


_OWN = ("_k", "_alpha", "_kept", "_stepping", "_loading", "_fresh")


def _ours(name: object) -> bool:
    return isinstance(name, str) and (name == SLOW or name.startswith(OF))


def _with_inner(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict's own entries beside those of the inner optimizer's state dict."""
    assert isinstance(opt, Lookahead)
    inner = opt.optimizer.state_dict()
    state = dict(inner["state"])
    for i, entries in state_dict["state"].items():
        if isinstance(entries, Mapping) and SLOW in entries:
            state[i] = {**state.get(i, {}), **{name: x for name, x in entries.items() if _ours(name)}}
    return {**inner, "state": state}


def _split(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The dict with our entries alone, protected; the rest is put aside for the inner optimizer. Or ValueError."""
    assert isinstance(opt, Lookahead)
    saved, groups = state_dict["param_groups"], opt.param_groups
    if any(STEP not in group for group in saved):
        raise ValueError("this is no Lookahead's state; load a plain optimizer's state before wrapping it")
    for ours, theirs in zip(groups, saved, strict=False):  # torch says what else is wrong with groups
        _settle({K: theirs.get(K), ALPHA: theirs.get(ALPHA), "params": []}, opt._k, opt._alpha)
        same_kind(opt.optimizer, ours, theirs)
    params = {i: p for a, b in zip(saved, groups, strict=False) for i, p in zip(a["params"], b["params"], strict=False)}
    mine: dict[Any, dict[str, Any]] = {}
    rest: dict[Any, Any] = {}
    for i, entries in state_dict["state"].items():
        if i not in params or not isinstance(entries, Mapping):
            rest[i] = entries
            continue
        for name, x in entries.items():
            if not _ours(name):
                rest.setdefault(i, {})[name] = x
            elif x.shape != params[i].shape:
                raise ValueError(f"{name} of parameter {i} has shape {(*x.shape,)}, wanted {(*params[i].shape,)}")
            else:
                mine.setdefault(i, {})[name] = AsItIs(x)
    if saved[0][STEP] > 0 and (missing := [i for i in params if i not in mine and params[i].requires_grad]):
        raise ValueError(f"{SLOW} is missing for parameter {missing[0]}")
    opt._loading = {**state_dict, "state": rest}
    return {**state_dict, "state": mine}


def _settle(group: dict[str, Any], k: int, alpha: float) -> None:
    """Put in what the group does not say, as Python's own numbers; ValueError or TypeError for what cannot be."""
    k, alpha = group.get(K, k), group.get(ALPHA, alpha)
    if type(k) is int and type(alpha) is float and k >= 1 and 0 <= alpha <= 1 and STEP in group and K in group:
        return
    try:
        group[K], group[ALPHA] = index(None if isinstance(k, bool) else k), float(alpha)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"k must be an integer and alpha a number, got {k!r} and {alpha!r}") from None
    if group[K] < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    if not 0 <= group[ALPHA] <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    _floating(group["params"])


def _floating(params: list[Tensor]) -> None:
    for p in params:
        if not p.is_floating_point():
            raise TypeError(f"parameters must be real and floating, got one of {p.dtype}")


def _unlike(p: Tensor, slow: Tensor) -> bool:
    return p.device != slow.device or _wide(p) != slow.dtype


def _at_first(name: str, x: Any) -> Any:
    """A state that one step made, as it was before it."""
    begin = {"step": 0, "mu_product": 1}.get(name)
    return x if begin is None else x.detach().fill_(begin) if isinstance(x, Tensor) else begin


def _fresh_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Of an optimizer that makes its state when it is constructed: the state of another one of its kind."""
    wanted = inspect.signature(type(optimizer)).parameters
    defaults = {name: x for name, x in (vars(optimizer) | optimizer.defaults).items() if name in wanted}
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
