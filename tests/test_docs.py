"""Examples in public docstrings and in the README run, and say what they say."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq
from pyseq import ops, optim
from pyseq.ops import _check

README = Path(__file__).resolve().parents[1] / "README.md"


def documented() -> Iterator[tuple[str, Any]]:
    """Public functions, classes, and what the methods of modules compute."""
    yield "Signature", _check.Signature
    for folder in ("ops", "nn", "optim", "models", "surgery"):
        module = importlib.import_module(f"pyseq.{folder}")
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, type) and issubclass(thing, torch.nn.Module):
                if ">>>" in (thing.__doc__ or ""):
                    yield name, thing
                kinds = [kind for kind in reversed(thing.__mro__) if kind.__module__.startswith("pyseq.")]
                both = {k: f for kind in kinds for k, f in vars(kind).items()}
                own = {k: f for k, f in both.items() if inspect.isfunction(f) and not k.startswith("_")}
                yield from ((f"{name}.{k}", f) for k, f in own.items() if k not in ("extra_repr", "reset_parameters"))
            elif folder == "optim" or (inspect.isfunction(thing) and name != "explain"):  # which the README shows
                yield name, thing


@pytest.mark.parametrize(("name", "thing"), [*documented()], ids=lambda x: x if isinstance(x, str) else "")
def test_docstring(name: str, thing: Any) -> None:
    """Each has an example."""
    globs = {
        "torch": torch,
        "pyseq": pyseq,
        "ops": ops,
        "optim": optim,
        **vars(importlib.import_module(thing.__module__)),
    }
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=globs)
    assert test.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_readme() -> None:
    """Its Python blocks, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(README), "exec"), {"__name__": "readme"})
