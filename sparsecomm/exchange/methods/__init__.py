"""The exchange methods, each in a file or folder. Importing this package registers all of them."""

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
