"""Parts of a model, from any of its values to any others, as modules that share its weights."""

import difflib
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseq._capture import Built, Flag, Graph, Held, Node, Uncapturable, leaves

SPACES = {"torch": torch, "F": F, "operator": operator, "math": math}


def shown(names: list[str] | None) -> str:
    return "the model's own" if names is None else ", ".join(names)


class Part(nn.Module):
    """What `submodel` gives: an ordinary module whose forward is generated code, shown by `code`.

    inputs, outputs: the addresses that it goes from and to; None: the model's own.
    Its modules, parameters and buffers are the model's own objects under the same names, as far as it uses them, so
    `train`, `eval`, `to` and hooks act on these in both; what the model's own code does in one mode alone follows the
    part's mode. Copies and pickles are models of their own.
    """

    def __init__(self, inputs: list[str] | None, outputs: list[str] | None) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self._programs: dict[bool, Program] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The values at `outputs`: one as it is, several as a tuple."""
        return self._run[self.training](self, *args, **kwargs)

    @property
    def code(self) -> str:
        """The Python code that runs in the present mode."""
        return self._programs[self.training].source

    def _compile(self) -> None:
        self._run = {mode: program.compiled() for mode, program in self._programs.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def extra_repr(self) -> str:
        return f"inputs: {shown(self.inputs)}; outputs: {shown(self.outputs)}"


@dataclass
class Program:
    """Source of a function forward(self, ...), and the objects that it names."""

    source: str
    objects: dict[str, Any]

    def compiled(self) -> Any:
        found: dict[str, Any] = {**SPACES, **self.objects, "_hold": hold}
        exec(compile(self.source, "<part of a model>", "exec"), found)
        return found["forward"]


def hold(value: Any, seen: Any, what: str) -> None:
    """Refuse a size, or an argument that is no tensor, for which the model's code would have gone another way."""
    if value != seen:
        raise ValueError(
            f"{what} must be as in the example, {seen!r}, got {value!r}; make the part with such an example"
        )


Places = Mapping[str, list[Any]]


def addresses(places: Places) -> list[str]:
    """All that may be asked for, calls numbered where there are several."""
    return [
        address if len(times) == 1 else f"{address}#{i}" for address, times in places.items() for i in range(len(times))
    ]


def found(places: Places, inputs: Mapping[str, Any], address: str) -> Any:
    """What is at an address, or an input of the model by its name."""
    if address in inputs and address not in places:
        return inputs[address]
    base, numbered, call = address.partition("#")
    times = places.get(base)
    if times is None:
        near = difflib.get_close_matches(address, [*addresses(places), *inputs], 5, 0.4)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"no value at {address!r}{nearest}; surgery.nodes(model, *example) lists all")
    if not call and len(times) > 1:
        calls = [f"{base}#{i}" for i in range(len(times))]
        shown = ", ".join(calls if len(calls) < 9 else [*calls[:3], "...", calls[-1]])
        raise ValueError(f"{base!r} is computed {len(times)} times, name one: {shown}")
    if numbered and not (call.isdecimal() and int(call) < len(times)):
        raise ValueError(f"{address!r}: {base!r} is computed {len(times)} times, calls count from 0")
    return times[int(call or 0)]


class Cut:
    """The nodes of a graph that lead from some of its values to others."""

    def __init__(self, graph: Graph, starts: Mapping[str, Any], ends: Any, at_the_end: bool) -> None:
        self.graph, self.starts, self.ends = graph, starts, ends
        self.given = {x for x in leaves(starts) if type(x) is Node}
        self.mutators: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            for changed in node.mutates:
                self.mutators.setdefault(changed, []).append(node)
        self.last = [x for x in leaves(ends) if type(x) is Node]
        self.needed = self._closure(self.last)
        if at_the_end:  # the model hands its values out after all that changes them
            changes = [m for x in self.last for m in self.mutators.get(x, ())]
            self.needed |= self._closure(changes)
        self.fixed = not at_the_end

    def before(self, node: Node) -> list[Node]:
        """What a node waits for: its arguments, and whatever wrote into them since they were made."""
        made = node.inputs
        return made + [m for x in made for m in self.mutators.get(x, ()) if x.index < m.index < node.index]

    def _closure(self, ends: Iterable[Node]) -> set[Node]:
        seen: set[Node] = set()
        todo = [*ends]
        while todo:
            node = todo.pop()
            if node not in seen and node not in self.given:
                seen.add(node)
                todo += self.before(node)
        return seen

    def leaks(self) -> list[tuple[Node, Node]]:
        """Values that come from the model's inputs past the cut, each with the node that wants it."""
        after, stray = {*self.given}, set()
        for node in sorted(self.needed, key=lambda x: x.index):
            made = self.before(node)
            if any(x in after for x in made):
                after.add(node)
            elif node.op == "input" or any(x in stray for x in made):
                stray.add(node)
        return [(x, node) for node in self.needed if node in after for x in self.before(node) if x in stray] + [
            (x, x) for x in self.last if x in stray
        ]

    def guards(self) -> list[tuple[Node, Any, str]]:
        """What a part can check of the sizes it gets; `unseen` has the lines that read others, with their values."""
        self.unseen: dict[tuple[str, str], str] = {}
        if not self.needed:
            return []
        held, end = [], max(x.index for x in self.needed)
        for guard in self.graph.guards:
            want = self._closure([guard.node])
            tensors = {x for x in want if x.shape is not None}
            if any(x.op == "input" for x in want):
                if guard.position <= end:
                    self.unseen.setdefault(guard.line, self._source(want))
            elif tensors <= self.needed:
                self.needed |= want
                held.append((guard.node, guard.seen, f"what {guard.where} reads of a size"))
        return held

    def _source(self, want: set[Node]) -> str:
        last = max((x for x in want if x.shape is not None), key=lambda x: x.index)
        return repr(named(last))


def named(node: Node) -> str:
    """What a node is called: its address, or that of the value whose size it is."""
    while not node.address and node.op not in ("input", "tensor") and node.inputs:
        node = node.inputs[0]
    return node.address or str(node.target)


class Writer:
    """Turns a cut into code."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.names: dict[Node, str] = {}
        self.objects: dict[str, Any] = {}
        self.lines: list[str] = []
        self.written = Program("", {})
        self.modules: set[str] = set()
        self.flags: set[str] = set()
        self.held: dict[Held, str] = {}  # those that an input has in it

    def object(self, x: Any, prefix: str = "c") -> str:
        for name, known in self.objects.items():
            if known is x:
                return name
        name = f"{prefix}{len(self.objects)}"
        self.objects[name] = x
        return name

    def text(self, x: Any) -> str:
        kind = type(x)
        if kind is Node:
            return self.names[x]
        if kind is Held:
            if x not in self.held:
                raise Uncapturable(x.reason)
            return self.held[x]
        if kind is Flag:
            self.flags.add(x.owner)
            return f"{'not ' if x.contrary else ''}{path('self', x.owner)}.training"
        if kind is Built:
            return f"{self.object(x.kind, 'Kind')}({', '.join(f'{k}={self.text(v)}' for k, v in x.values.items())})"
        if kind is slice:
            return f"slice({self.text(x.start)}, {self.text(x.stop)}, {self.text(x.step)})"
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return f"{self.object(kind, 'Kind')}._make(({''.join(f'{self.text(one)}, ' for one in x)}))"
        if isinstance(x, tuple):
            return f"({''.join(f'{self.text(one)}, ' for one in x)})"
        if kind is list:
            return f"[{', '.join(map(self.text, x))}]"
        if kind is dict:
            return f"{{{', '.join(f'{k!r}: {self.text(v)}' for k, v in x.items())}}}"
        if x is None or x is Ellipsis or kind in (bool, int, str) or (kind is float and math.isfinite(x)):
            return "..." if x is Ellipsis else repr(x)
        if kind is torch.dtype:
            return str(x)
        return self.object(x)

    def function(self, target: Any) -> str:
        name = getattr(target, "__name__", "")
        for space, module in SPACES.items():
            if getattr(module, name, None) is target:
                return f"{space}.{name}"
        return "getattr" if target is getattr else self.object(target, "f")

    def step(self, node: Node) -> str:
        if node.op == "tensor":
            return path("self", node.target)
        given = [self.text(x) for x in node.args] + [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        if node.op == "module":
            self.modules.add(node.target)
            return f"{path('self', node.target)}({', '.join(given)})"
        if node.op == "method":
            return f"{given[0]}.{node.target}({', '.join(given[1:])})"
        return f"{self.function(node.target)}({', '.join(given)})"

    def program(self) -> Program:
        cut = self.cut
        held = cut.guards()
        parameters = [self._start(name, tree) for name, tree in cut.starts.items()]
        needed = sorted(cut.needed, key=lambda x: x.index)
        seen_at = {node: f"_hold(v{node.index}, {self.text(seen)}, {what!r})" for node, seen, what in held}
        wrote = {x for node in needed for x in node.mutates}
        for node in sorted(cut.given & wrote, key=lambda x: x.index):
            self.lines.append(f"{self.names[node]} = {self.names[node]}.clone()")  # the caller's stays as it is
        for node in needed:
            line = self.step(node)
            self.names[node] = f"v{node.index}"
            under = f"with {', '.join(node.under)}: " if node.under else ""
            self.lines.append(f"{under}v{node.index} = {line}")
            if node in seen_at:
                self.lines.append(seen_at[node])
        result = self._result(wrote)
        body = "\n    ".join([*self._freed(result), f"return {result}"])
        return Program(f"def forward(self, {', '.join(parameters)}):\n    {body}\n", self.objects)

    def plain(self) -> tuple[str, list[Any]]:
        """The code with its variables numbered from 0, and what it names."""
        names: dict[str, str] = {}
        source = re.sub(
            r"\b(v|held|kept)\d+\b", lambda x: names.setdefault(x[0], f"{x[1]}_{len(names)}"), self.written.source
        )
        return source, [x for x in self.objects.values() if isinstance(x, (int, float, str, torch.dtype, torch.device))]

    def _start(self, name: str, tree: Any) -> str:
        """A parameter; whatever is no tensor in it must be as it was."""
        safe = re.sub(r"\W", "_", name)
        safe = safe if safe.isidentifier() and not keyword.iskeyword(safe) else f"at_{safe}"
        if type(tree) is Node:
            self.names[tree] = safe
            return safe
        if not any(type(x) is Node for x in leaves(tree)):
            seen = self.text(tree)
            self.lines.append(f"_hold({safe}, {seen}, {name!r})")
            return f"{safe}={seen}"
        self._unpacked(tree, safe, name)
        return safe

    def _unpacked(self, tree: Any, at: str, name: str) -> None:
        if type(tree) is Node:
            self.names[tree] = f"v{tree.index}"
            self.lines.append(f"v{tree.index} = {at}")
        elif isinstance(tree, (tuple, list)):
            for i, one in enumerate(tree):
                self._unpacked(one, f"{at}[{i}]", f"{name}[{i}]")
        elif isinstance(tree, dict):
            for key, one in tree.items():
                self._unpacked(one, f"{at}[{key!r}]", f"{name}[{key!r}]")
        elif type(tree) is Built:
            for key, one in tree.values.items():
                self._unpacked(one, f"{at}.{key}", f"{name}.{key}")
        elif type(tree) is Held:
            self.held[tree] = f"held{tree.number}"
            self.lines.append(f"held{tree.number} = {at}")
        else:
            self.lines.append(f"_hold({at}, {self.text(tree)}, {name!r})")

    def _result(self, wrote: set[Node]) -> str:
        """What is returned; of a value that is written into later, what it was when it was made."""
        if self.cut.fixed:
            for node in {x for x in self.cut.last if x in wrote}:
                made, kept = self.names[node], f"kept{node.index}"
                at = next((i for i, x in enumerate(self.lines) if re.search(rf"(^|: ){made} = ", x)), -1)
                self.lines.insert(at + 1, f"{kept} = {made}.clone()")
                self.names[node] = kept
        return self.text(self.cut.ends)

    def _freed(self, result: str) -> list[str]:
        """The lines, each variable let go after its last use."""
        last: dict[str, int] = {}
        for i, line in enumerate(self.lines):
            for name in re.findall(r"\bv\d+\b", line):
                last[name] = i
        for name in re.findall(r"\bv\d+\b", result):
            last.pop(name, None)
        gone: dict[int, list[str]] = {}
        for name, i in last.items():
            gone.setdefault(i, []).append(name)
        return [f"{line}; del {', '.join(gone[i])}" if i in gone else line for i, line in enumerate(self.lines)]


def path(root: str, name: str) -> str:
    for step in name.split(".") if name else ():
        root = f"{root}.{step}" if step.isidentifier() else f"getattr({root}, {step!r})"
    return root


def shell(part: nn.Module, model: nn.Module, at: str) -> nn.Module:
    """The module of a part at a path, empty ones made on the way."""
    for i, step in enumerate(steps := at.split(".") if at else []):
        if not hasattr(part, step):
            fresh = nn.Module()
            fresh.training = model.get_submodule(".".join(steps[: i + 1])).training
            part.add_module(step, fresh)
        part = getattr(part, step)
    return part


def hold_tensor(holder: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    if not hasattr(holder, name):
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder.register_buffer(name, tensor, persistent=persistent)


def fill(part: Part, model: nn.Module, graph: Graph, writer: Writer) -> None:
    """Give the part the modules and tensors that its code names, in shells where the way to them is not needed."""
    persistent = set(model.state_dict())
    for name in sorted(writer.modules):
        owner, _, last = name.rpartition(".")
        shell(part, model, owner).add_module(last, model.get_submodule(name))
    for name in sorted({x.target for x in writer.cut.needed if x.op == "tensor"}):
        owner, _, last = name.rpartition(".")
        if name in graph.constants:
            hold_tensor(part, name, graph.constants[name], False)
        else:
            tensor = getattr(model.get_submodule(owner), last)
            hold_tensor(shell(part, model, owner), last, tensor, name in persistent)
    for owner in sorted(writer.flags):
        shell(part, model, owner)


def listed(addresses: str | Sequence[str] | None, what: str) -> list[str] | None:
    if addresses is None:
        return None
    names = [addresses] if isinstance(addresses, str) else [*addresses] if isinstance(addresses, Sequence) else []
    if not names or not all(isinstance(x, str) for x in names):
        raise ValueError(f"{what} must be an address or a list of addresses, got {addresses!r}")
    if len({*names}) < len(names):
        raise ValueError(f"{what} names an address twice: {', '.join(names)}")
    return names


def separated(cut: Cut, inputs: Sequence[str], outputs: Sequence[str] | None) -> None:
    """Refuse a cut that the model's inputs pass, or that nothing hangs on."""
    if leaks := cut.leaks():
        leaks.sort(key=lambda x: (x[1].index, x[0].index))
        past = {
            f"{'' if x.shape else 'a size of '}{named(x)!r} is wanted by {named(y)!r}": named(x)
            for x, y in leaks
            if x is not y
        }
        some = [named(x) for x, y in leaks if x is y]
        if not past and {*some} < {named(x) for x in cut.last}:
            more = ", ".join(dict.fromkeys(some))
            raise ValueError(
                f"the cut at {', '.join(map(repr, inputs))} leaks: {more} is part of the result; add {more} to inputs"
            )
        if not past:
            ends = "the model's output" if outputs is None else ", ".join(map(repr, outputs))
            raise ValueError(f"{ends} does not come after {', '.join(map(repr, inputs))}; choose earlier inputs")
        more = ", ".join(dict.fromkeys(past.values()))
        raise ValueError(f"the cut at {', '.join(map(repr, inputs))} leaks: {'; '.join(past)}; add {more} to inputs")
    used = {x for node in cut.needed for x in cut.before(node)} | {*cut.last}
    for name, tree in cut.starts.items():
        if not used.intersection(x for x in leaves(tree) if type(x) is Node):
            raise ValueError(f"the outputs do not hang on {name!r}; leave it out of inputs")


def written_by(
    graph: Graph, inputs: list[str] | None, outputs: list[str] | None, edited: Sequence[str]
) -> Writer:  # fmt: skip
    starts = {name: found(graph.places, graph.inputs, name) for name in edited}
    own = inputs is None
    starts |= graph.inputs if own else {name: found(graph.places, graph.inputs, name) for name in inputs or ()}
    ends: Any = graph.output
    if outputs is not None:
        each = tuple(found(graph.places, graph.inputs, name) for name in outputs)
        ends = each[0] if len(each) == 1 else each
    cut = Cut(graph, starts, ends, at_the_end=outputs is None)
    if not own:
        separated(cut, inputs or (), outputs)
    writer = Writer(cut)
    writer.written = writer.program()
    return writer


def steered(
    writer: Writer, flip: Callable[[], Graph], inputs: list[str] | None, outputs: list[str] | None,
    edited: Sequence[str],
) -> bool:  # fmt: skip
    """Whether the part would be another, had a line of code before the cut read another size there.

    A line that checks, and raises its own error, steers nothing.
    """
    try:
        graph = flip()
    except (ValueError, AssertionError, NotImplementedError):
        return False
    except Exception:
        return True
    try:
        again = written_by(graph, inputs, outputs, edited)
    except (ValueError, Uncapturable):  # no such part
        return True
    return writer.plain() != again.plain()


def from_graphs(
    model: nn.Module, graphs: Mapping[bool, Graph], inputs: list[str] | None, outputs: list[str] | None,
    flip: Callable[[Graph, bool, Any], Graph], edited: Sequence[str] = (),
) -> Part:  # fmt: skip
    """The part; edited: addresses that it takes besides the model's own inputs. flip: see `steered`."""
    part = Part([*edited] if edited else inputs, outputs)
    part.training = model.training
    written: dict[int, Program] = {}
    for mode, graph in graphs.items():
        if id(graph) not in written:
            writer = written_by(graph, inputs, outputs, edited)
            for line, source in writer.cut.unseen.items():
                if steered(writer, partial(flip, graph, mode, line), inputs, outputs, edited):
                    raise ValueError(
                        f"the model's code reads a size of {source} at {line[0]}, and the part cannot: add that "
                        "value to inputs"
                    )
            written[id(graph)] = writer.written
            fill(part, model, graph, writer)
        part._programs[mode] = written[id(graph)]
    part._compile()
    return part
