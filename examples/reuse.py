"""Layers and models as freely reused as in Keras: six techniques, each in a few lines, on a residual network.

Prints what each gives, and checks that it is what was wanted. After Su 2019, https://kexue.fm/archives/6985.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyseq
from pyseq import surgery


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.relu(x + h)


class ResNet(nn.Module):
    """Two stages of residual blocks, as in ResNet, small."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(Block(16), Block(16))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.layer2 = nn.Sequential(Block(32), Block(32))
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer2(self.down(self.layer1(self.stem(x))))
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


def show(what: str, holds: bool) -> None:
    if not holds:
        raise SystemExit(f"not so: {what}")
    print(f"  {what}")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shared_layer() -> None:
    """One layer, called three times: built once, its weights are shared and counted once."""

    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(784, 784)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = F.relu(self.dense(x))
            return x

    model, x = Thrice(), torch.randn(2, 784)
    show(f"called three times, counted once: {count(model):,} parameters", count(model) == 784 * 785)
    apart = surgery.unshare(model, example=x)
    show(f"and three layers when wanted: {count(apart):,}", torch.equal(apart(x), model(x)))


def model_as_layer(model: ResNet, x: Tensor) -> None:
    """A trained model inside another one: a module is a layer."""
    grey = nn.Sequential(nn.Conv2d(1, 3, 1), model)
    grey(x[:, :1]).sum().backward()
    show("the model learns inside the new one", model.stem.weight.grad is not None)
    model.zero_grad()


def clones(model: ResNet, x: Tensor) -> None:
    """The same structure, with the weights or with fresh ones."""
    same, fresh = surgery.clone(model), surgery.clone(model, copy_weights=False)
    show("a clone predicts the same", torch.equal(same(x), model(x)))
    show("one with fresh weights does not", not torch.equal(fresh(x), model(x)))
    show("neither shares storage with the model", same.fc.weight.data_ptr() != model.fc.weight.data_ptr())  # type: ignore[union-attr, operator]


def cross_reference() -> None:
    """A layer of another kind that borrows a layer's matrix: the output layer of a language model."""
    embedding = nn.Embedding(1000, 32)
    head = pyseq.nn.TiedLinear(embedding)
    model = nn.Sequential(embedding, nn.LayerNorm(32), head)
    tokens = torch.randint(0, 1000, (2, 7))
    logits = model(tokens)
    show(f"scores {(*logits.shape,)} from the embedding's own matrix", torch.equal(head.weight, embedding.weight))
    show("no new weight but a bias of zeros", count(head) == 1000)


def intermediate_outputs(model: ResNet, x: Tensor) -> None:
    """Several inner values at once, and nothing computed past them."""
    features = surgery.submodel(model, ["layer1.0", "layer2.0.add"], example=x)
    first, second = features(x)
    show(f"values {(*first.shape,)} and {(*second.shape,)}", torch.equal(first, model.layer1[0](model.stem(x))))
    show(f"of {count(features):,} of {count(model):,} parameters", count(features) < count(model))


def cut_in_the_middle(model: ResNet, x: Tensor) -> None:
    """From an inner value to the end: what comes before is neither needed nor computed."""
    head = surgery.submodel(model, "layer2.0.add", example=x)
    tail = surgery.submodel(model, inputs="layer2.0.add", example=x)
    show("head and tail are the model, to the bit", torch.equal(tail(head(x)), model(x)))
    show(f"the tail has {count(tail):,} parameters", count(tail) < count(model))
    edited = surgery.rerun(model, x, {"layer1": torch.zeros(2, 16, 8, 8)})
    show("an edited value goes through the rest", not torch.equal(edited, model(x)))


def main() -> None:
    torch.manual_seed(0)
    model, x = ResNet().eval(), torch.randn(2, 3, 8, 8)
    print("1. A shared layer")
    shared_layer()
    print("2. A model as a layer")
    model_as_layer(model, x)
    print("3. Clones, with and without weights")
    clones(model, x)
    print("4. A cross reference")
    cross_reference()
    print("5. Intermediate outputs")
    intermediate_outputs(model, x)
    print("6. A cut in the middle")
    cut_in_the_middle(model, x)
    print("Any address can be named; these are the model's:")
    print(surgery.nodes(model, x))


if __name__ == "__main__":
    main()
