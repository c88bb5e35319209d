"""The ways of exchanging a bucket, one a file or folder. Importing this package registers them all."""

from sparsecomm.exchange.methods import (  # noqa: F401
    allgather,
    chunked,
    dense,
    powersgd,
    shared_index,
    sign,
    split_reduce,
    tree,
    two_level,
)
