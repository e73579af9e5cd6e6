"""Adam that touches only the rows of embedding tables that a step has seen."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from pyseq.kernels.lazy_adam import Tables
from pyseq.ops import _lazy_adam
from pyseq.ops._torch import traced
from pyseq.ops.lazy_adam import hyper_of
from pyseq.optim._state import AsItIs, protected, state_like

Semantics = Literal["skip", "decay"]
BiasCorrection = Literal["global", "row"]
HALF = (torch.bfloat16, torch.float16)


class LazyAdam(Optimizer):
    """Adam with decoupled weight decay for sparse, row-sparse and dense gradients in one optimizer.

    A sparse gradient (`nn.Embedding(sparse=True)`), coalesced or not, updates its rows and nothing else; the gradients
    of one row are added up. A dense gradient of a parameter group with `lazy=True` does the same for the rows of a
    matrix that are not all zero. Every other parameter has `torch.optim.AdamW`'s step.

    lr: a number or a tensor, 0 is one. betas, eps, amsgrad, maximize: as for `torch.optim.Adam`; eps acts in sparse
    rows as in dense ones. foreach: of dense parameters; None: torch's fused kernel.
    weight_decay: decoupled; of a row, once in each step that sees it.
    semantics: what happens to averages of rows that a step has not seen. "skip": nothing; "decay": they fade, as if
    the gradient had been 0, and only the weights are frozen. The fading is made up for when the row is seen again, from
    the number of steps between; betas may not change then.
    bias_correction: "global" by the steps of the table; "row" by how often the row was seen, so that a rare row's step
    is at most about lr, which by the former reaches 3.2 lr.
    state_dtype: of the averages, torch.float32 or bfloat16; float64 parameters have float64 ones.
    capturable: for CUDA graphs; lr is to be a tensor then. Steps are counted on the device in any case, and nothing
    waits for it.
    count_rows: whether to count in `state[p]["touches"]` how often each row was updated.

    bfloat16 tables are rounded at random, by a counter of their own and `seed` in the state: replicas stay equal, and
    torch's generator is not used. A row whose gradient is not finite is left alone.
    A checkpoint brings the options of its groups; count_rows and, for what it lacks, state_dtype are this object's.
    State, there from the start and in no dtype but its own after loading: step, exp_avg, exp_avg_sq, with amsgrad
    max_exp_avg_sq, for matrices last and touches (int32) where needed, beside bfloat16 seed.

    Time of a step: of the rows it has seen, not of the table. Memory: two tables of state_dtype.
    Raises ValueError for numbers and words out of range, for sparse gradients of what is no matrix, and when betas
    change under "decay"; TypeError for complex or integer parameters.
    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization"; Loshchilov and Hutter 2019.

    >>> table = torch.nn.Embedding(1000, 8, sparse=True)
    >>> opt = optim.LazyAdam(table.parameters(), lr=0.01)
    >>> table(torch.tensor([3, 3, 7])).sum().backward()
    >>> opt.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        semantics: Semantics = "skip",
        bias_correction: BiasCorrection = "global",
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
        capturable: bool = False,
        count_rows: bool = False,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        if capturable and not isinstance(lr, Tensor):
            raise ValueError(f"lr must be a tensor with capturable=True, for a graph records numbers; got {lr!r}")
        self.state_dtype, self.count_rows = state_dtype, bool(count_rows)
        self._numbers: dict[tuple[Any, ...], Tensor] = {}
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "semantics": semantics, "bias_correction": bias_correction, "foreach": foreach,
            "capturable": capturable, "lazy": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """With the options of the constructor, and `lazy`: True for matrices whose dense gradients have rows of
        zeros, which are then not seen; None for rows of sparse gradients alone."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self.state[p] = self._fresh(p, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [self._sorted(group) for group in self.param_groups]
        if sum(map(bool, (x for each in found for x in each))) > 1:  # else the kernel looks before it writes
            for p in (p for sparse, _, _ in found for p in sparse):
                _check_rows(p)
        for group, (sparse, rows, dense) in zip(self.param_groups, found, strict=True):
            self._lazy(group, sparse, False)
            self._lazy(group, rows, True)
            one = [group["foreach"] is None and _in_one_kernel(p, self.state[p]) for p in dense]
            self._dense(group, [*compress(dense, one)], True)
            self._dense(group, [p for p, x in zip(dense, one, strict=True) if not x], False)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a LazyAdam with parameters of these shapes, else ValueError, and nothing is loaded then."""
        state_like(state_dict)
        self._refuse(state_dict)
        super().load_state_dict({**state_dict, "state": protected(state_dict["state"])})
        for p, entries in self.state.items():
            for name, x in entries.items():
                if isinstance(x, AsItIs):
                    entries[name] = x.on(p.device).contiguous()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._numbers = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state_dtype": self.state_dtype, "count_rows": self.count_rows}

    def _fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = torch.float64 if p.dtype == torch.float64 else self.state_dtype
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        state = {"step": torch.zeros((), device=p.device)}
        state |= {name: torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format) for name in names}
        if p.dim() == 2:
            if group["semantics"] == "decay":
                state["last"] = torch.zeros(p.size(0), dtype=torch.int32, device=p.device)
            if group["bias_correction"] == "row" or self.count_rows:
                state["touches"] = torch.zeros(p.size(0), dtype=torch.int32, device=p.device)
            if torch.bfloat16 in (p.dtype, dtype):
                state["seed"] = self._seed(p)
        return state

    def _complete(self, p: Tensor, group: dict[str, Any]) -> None:
        """What its state lacks: all where a checkpoint had nothing of a frozen parameter, or what an option wants that
        the group did not have before."""
        state = self.state[p]
        if "step" not in state:
            self.state[p] = state = self._fresh(p, group)
        if (p.dtype == torch.float64) != (state["exp_avg"].dtype == torch.float64):
            wanted = torch.float64 if p.dtype == torch.float64 else self.state_dtype
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(wanted)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        if p.dim() != 2:
            return
        if group["semantics"] == "decay" and "last" not in state:
            state["last"] = state["step"].int().expand(p.size(0)).contiguous()
        if (group["bias_correction"] == "row" or self.count_rows) and "touches" not in state:
            state["touches"] = torch.zeros(p.size(0), dtype=torch.int32, device=p.device)
        if torch.bfloat16 in (p.dtype, state["exp_avg"].dtype) and "seed" not in state:
            state["seed"] = self._seed(p)

    def _seed(self, p: Tensor) -> Tensor:
        """Another one for each parameter, the same in every process."""
        number = next(i for i, q in enumerate(q for g in self.param_groups for q in g["params"]) if q is p)
        return torch.tensor(0x5EED + number, device=p.device)

    def _sorted(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters with a gradient: sparse, dense but for rows, dense. Raises before anything is written."""
        _check(group)
        sparse: list[Tensor] = []
        rows: list[Tensor] = []
        dense: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            lazy = p.grad.is_sparse or group["lazy"]
            if lazy and (p.dim() != 2 or (p.grad.is_sparse and p.grad.sparse_dim() != 1)):
                raise ValueError(f"rows of a matrix can be lazy, got a parameter of shape {(*p.shape,)}")
            if lazy and p.dtype == torch.float16:
                raise TypeError("tables must be of dtype torch.float32, torch.float64 or torch.bfloat16, got float16")
            if p.grad.is_sparse and group["lazy"] is False:
                raise ValueError("a gradient is sparse in a group with lazy=False; leave lazy out")
            self._complete(p, group)
            (sparse if p.grad.is_sparse else rows if lazy else dense).append(p)
        if (sparse or rows) and group["semantics"] == "decay":
            betas = group.setdefault("decay_betas", tuple(group["betas"]))
            if tuple(betas) != tuple(group["betas"]):
                raise ValueError(
                    f"betas may not change with semantics='decay', got {group['betas']} after {betas}; give "
                    "OneCycleLR cycle_momentum=False"
                )
        return sparse, rows, dense

    def _lazy(self, group: dict[str, Any], params: list[Tensor], dense: bool) -> None:
        for device in {p.device: None for p in params}:
            on = [p for p in params if p.device == device]
            states = [self.state[p] for p in on]
            torch._foreach_add_([s["step"] for s in states], 1)
            grads = [p.grad for p in on if p.grad is not None]
            half = [torch.bfloat16 in (p.dtype, s["exp_avg"].dtype) for p, s in zip(on, states, strict=True)]
            for some in (False, True):
                of = [i for i, h in enumerate(half) if h is some]
                if not of:
                    continue
                try:
                    self._update(group, [on[i] for i in of], [grads[i] for i in of], [states[i] for i in of], dense)
                except ValueError:
                    torch._foreach_sub_([s["step"] for s in states], 1)
                    raise

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any], dense: bool
    ) -> None:
        def each(name: str) -> list[Tensor]:
            return [s[name] for s in states] if name in states[0] else []

        tables = Tables(
            params,
            each("exp_avg"),
            each("exp_avg_sq"),
            each("max_exp_avg_sq"),
            each("last"),
            each("touches"),
            [] if dense else [g._indices()[0] for g in grads],
            grads if dense else [g._values() for g in grads],
            each("step"),
            each("seed"),
            self._hyper(group, params[0].device),
        )
        decay, row_bias = group["semantics"] == "decay", group["bias_correction"] == "row"
        _lazy_adam.update(tables, decay, row_bias, group["maximize"], dense)

    def _hyper(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Made once, for nothing may come from the host while a graph is captured."""
        lr, rest = group["lr"], (*group["betas"], group["eps"], group["weight_decay"])
        key = (device, None if isinstance(lr, Tensor) else lr, *rest)
        if key not in self._numbers:
            if len(self._numbers) > 63:
                self._numbers.clear()
            self._numbers[key] = hyper_of(torch.empty(0, device=device), 0.0 if isinstance(lr, Tensor) else lr, *rest)
        numbers = self._numbers[key]
        if not isinstance(lr, Tensor):
            return numbers
        return torch.cat([lr.detach().to(device, torch.float64).view(1), numbers[1:]])

    def _dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        if not params:
            return
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        for state in states:
            if "last" in state:  # a matrix; its rows may have waited for a step that sees them
                gap = state["step"].to(torch.int32) - state["last"]
                if gap.is_cuda or gap.any():
                    state["exp_avg"].mul_((beta1 ** gap.double()).unsqueeze(1))
                    state["exp_avg_sq"].mul_((beta2 ** gap.double()).unsqueeze(1))
                state["last"].copy_(state["step"] + 1)
            if "touches" in state:
                state["touches"] += 1
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        averages = [[s[name] for s in states if name in s] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        half = [p.dtype in HALF or s["exp_avg"].dtype in HALF for p, s in zip(params, states, strict=True)]
        moved = [p.float() if h else p for p, h in zip(params, half, strict=True)]
        wide = [[x.float() if x.dtype in HALF else x for x in each] for each in averages]
        adam(
            moved,
            [g.float() if g.dtype in HALF else g for g in grads],
            wide[0],
            wide[1],
            wide[2],
            [s["step"] for s in states],
            foreach=group["foreach"],
            fused=fused,
            capturable=params[0].is_cuda,
            differentiable=False,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=True,
        )
        for to, x in zip((params, *averages), (moved, *wide), strict=True):
            for old, new in zip(to, x, strict=True):
                if old is not new:
                    old.copy_(new)

    def _refuse(self, state_dict: Mapping[str, Any]) -> None:
        saved = state_dict["param_groups"]
        if any(name not in group for group in saved for name in ("semantics", "bias_correction", "betas", "lr")):
            raise ValueError("this is the state of another optimizer than LazyAdam")
        for group, own in zip(saved, self.param_groups, strict=False):
            _check({**group, "lazy": group.setdefault("lazy", None), "params": own["params"]})
        params = {
            i: (p, a)
            for a, b in zip(saved, self.param_groups, strict=False)
            for i, p in zip(a["params"], b["params"], strict=False)
        }
        for i, entries in state_dict["state"].items():
            if i not in params or not entries:
                continue
            p, group = params[i]
            wanted: dict[str, tuple[int, ...]] = {"step": ()} | dict.fromkeys(("exp_avg", "exp_avg_sq"), (*p.shape,))
            if p.dim() == 2 and group["semantics"] == "decay":
                wanted["last"] = (p.size(0),)
            optional = {"max_exp_avg_sq": (*p.shape,), "last": (p.size(0),) if p.dim() else (), "seed": ()}
            optional["touches"] = optional["last"]
            for name, shape in (optional | wanted).items():
                x = entries.get(name)
                if x is None and name not in wanted:
                    continue
                if not isinstance(x, Tensor):
                    raise ValueError(f"{name} of parameter {i} must be a tensor, got {x!r:.40}")
                if tuple(x.shape) != shape:
                    raise ValueError(f"{name} of parameter {i} has shape {(*x.shape,)}, wanted {shape}")
                whole = name in ("last", "touches", "seed")
                if x.is_complex() or (whole == x.is_floating_point()):
                    raise ValueError(f"{name} of parameter {i} is of dtype {x.dtype}, wanted {_KIND[whole]}")


_KIND = ("a floating one", "an integer one")


def _in_one_kernel(p: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether torch's fused kernel, which goes by addresses, serves a parameter with its gradient and averages."""
    tensors = [p, p.grad, *(x for x in state.values() if x.shape == p.shape)]
    return p.device.type in ("cpu", "cuda") and all(x is not None and x.is_contiguous() for x in tensors)


def _check_rows(p: Tensor) -> None:
    """ValueError for a sparse gradient of a row that there is not; on the CPU."""
    assert p.grad is not None
    rows = p.grad._indices()[0]
    if rows.device.type == "cpu" and len(rows):
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= p.size(0):
            row = least if least < 0 else most
            raise ValueError(f"a table has rows 0 to {p.size(0) - 1}, and a gradient for row {row}")


def _check(group: dict[str, Any]) -> None:
    """ValueError or TypeError for what a group cannot be."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"lr must be a number or a real tensor of one, got {lr.dtype} of shape {(*lr.shape,)}")
        lr = lr.item() if lr.is_cpu and not traced() else 0.0
    for name, x in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not isinstance(x, Real):
            raise TypeError(f"{name} must be a number, got {x!r}")
        if not 0 <= float(x) < math.inf:
            raise ValueError(f"{name} must be a finite number from 0, got {x!r}")
    betas = group["betas"]
    if not hasattr(betas, "__len__") or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for name in ("amsgrad", "maximize"):
        if type(group[name]).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    for name, words in (("semantics", ("skip", "decay")), ("bias_correction", ("global", "row"))):
        if group[name] not in words:
            raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, got {group[name]!r}")
    if group["lazy"] not in (None, True, False):
        raise ValueError(f"lazy must be None, True or False, got {group['lazy']!r}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"parameters must be real and floating, got one of {p.dtype}")
