"""What launchers and ops agree on."""

PARTITION, NLL, SCORE = 0, 1, 2  # what a chain kernel computes
OK, BAD_TAG, BAD_LENGTH = 0, 1, 2  # status codes of a CPU kernel
