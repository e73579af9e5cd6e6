"""Plain torch implementations, one file a room: slow, differentiable twice, the oracle of every test."""
