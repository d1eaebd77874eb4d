"""What repositories written before version 0.2 name; it has moved."""

raise ImportError(
    "this model repository was written by an earlier version of the project; write it anew with "
    "'harness triton-repository'"
)
