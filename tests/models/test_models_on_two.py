"""Models on two gloo processes."""

from collections.abc import Callable


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP over two gloo processes, of autoencoders and priors, is one process with the joined batch; FSDP2 infers."""
    on_two("models_on_two.py")
