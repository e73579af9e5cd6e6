"""Which tags may come first, follow one another and come last."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scheme = Literal["BIO", "BIOES", "BMES"]
# start (K,), transitions (K, K), end (K,), bool, True where allowed; None: everything is
Constraints: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

# prefixes of tags inside a chunk that goes on, of tags that carry one on, and whether a chunk must be closed
_SCHEMES = {"BIO": ("BI", "I", False), "BIOES": ("BI", "IE", True), "BMES": ("BM", "ME", True)}


def tag_constraints(labels: Sequence[str], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """What a labelling scheme allows, for the `constraints` of `nn.CRF`, `nn.MEMM` and `nn.HMM`.

    labels: the names of the K tags, in the order of their numbers: O, or a letter of the scheme alone or with a type
    behind a dash, "B-PER". Each once; O, types and any letter may be missing.
    scheme: "BIO" (I-X only after B-X or I-X), "BIOES" or "BMES" (in both a chunk begins with B-X, goes on with I-X or
    M-X, and ends with E-X; S-X is a chunk of one).
    Returns start (K,), transitions (K, K), where [i, j] is for going from tag i to tag j, and end (K,): bool, True
    where allowed, on the CPU; modules bring them to where they compute.
    Raises ValueError for another scheme, a label that the scheme lacks, one that comes twice, and for no labels;
    TypeError for labels that are no strings.

    >>> start, transitions, end = tag_constraints(["O", "B-PER", "I-PER"], "BIO")
    >>> start, transitions[0]  # a chunk begins with B-PER
    (tensor([ True,  True, False]), tensor([ True,  True, False]))
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be 'BIO', 'BIOES' or 'BMES', got {scheme!r}")
    open_, inside, closes = _SCHEMES[scheme]
    tags = _parsed(labels, scheme)

    def follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
        if after[0] in inside:
            return before[0] in open_ and before[1] == after[1]
        return not (closes and before[0] in open_)

    outside = ("O", "")
    start = [follows(outside, tag) for tag in tags]
    end = [follows(tag, outside) for tag in tags]
    transitions = [[follows(before, after) for after in tags] for before in tags]
    # never on meta, where modules are built whose weights a checkpoint fills in
    first, pairs, last = (torch.tensor(allowed, device="cpu") for allowed in (start, transitions, end))
    return first, pairs, last


def _parsed(labels: Sequence[str], scheme: str) -> list[tuple[str, str]]:
    """The letter and the type of each label."""
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        mend = "; use list(...)" if isinstance(labels, str) else ""
        mend = "; use sorted(labels, key=labels.get)" if isinstance(labels, dict) else mend
        got = f"the string {labels!r}" if isinstance(labels, str) else type(labels).__name__
        raise TypeError(f"labels must be a sequence of strings, in the order of their numbers, got {got}{mend}")
    letters = "".join(dict.fromkeys(scheme.replace("O", "")))
    tags: dict[tuple[str, str], int] = {}
    for position, label in enumerate(labels):
        if not isinstance(label, str):
            raise TypeError(f"labels must be strings, got {label!r} at position {position}")
        letter, dash, kind = label.partition("-")
        if label != "O" and (letter not in [*letters] or bool(dash) != bool(kind)):
            wanted = f"wanted O, or one of {', '.join(letters)}, alone or with a type behind a dash, as in 'B-PER'"
            raise ValueError(f"{scheme} has no label {label!r}, which is at position {position}; {wanted}")
        if (letter, kind) in tags:
            raise ValueError(
                f"label {label!r} is at position {position} and at {tags[letter, kind]}; name each tag once"
            )
        tags[letter, kind] = position
    if not tags:
        raise ValueError("labels must not be empty")
    return list(tags)


def checked(constraints: Constraints | None, num_tags: int) -> Constraints:
    """Copies, which later changes of what was given do not reach."""
    if constraints is None:
        return None, None, None
    wanted = "constraints must be (start, transitions, end), as tag_constraints gives them"
    if not isinstance(constraints, (tuple, list)):
        raise TypeError(f"{wanted}, got {type(constraints).__name__}")
    if len(constraints) != 3:
        raise ValueError(f"{wanted}, got {len(constraints)} of them")
    names, shapes = ("start", "transitions", "end"), ((num_tags,), (num_tags, num_tags), (num_tags,))
    start, transitions, end = map(_copy, constraints, names, shapes)
    return start, transitions, end


def _copy(allowed: Tensor | None, name: str, shape: tuple[int, ...]) -> Tensor | None:
    if allowed is None:
        return None
    what = f"the constraint on {name} must be None or a bool tensor of shape {shape}, True where allowed"
    if not isinstance(allowed, Tensor):
        raise TypeError(f"{what}, got {type(allowed).__name__}; use torch.tensor")
    if allowed.dtype != torch.bool:
        raise TypeError(f"{what}, got dtype {allowed.dtype}; for scores of 0 and -inf use scores == 0")
    if allowed.shape != shape:
        raise ValueError(f"{what}, got shape {tuple(allowed.shape)}")
    if allowed.is_meta:
        raise ValueError(f"{what}, got one on meta, which has no values; make it with device='cpu'")
    return allowed.detach().clone()
