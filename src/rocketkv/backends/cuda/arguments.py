"""What the kernels are given, as a C structure: `Layer` in kernels/layer.cuh has the same fields."""

from ctypes import Structure, c_float, c_int, c_longlong, c_void_p

from torch import Tensor

TENSORS = (  # their addresses are the first fields
    *("query", "key", "value", "output", "report"),
    *("keys", "values", "exponents", "positions", "lengths", "archive_lengths", "seen"),
    *("num_channels", "top_k", "dense_lengths", "sinks", "recents"),
    *("bounds", "page_size", "codes", "ranges", "open_keys", "spread", "sink_logits"),
    *("logits", "partials", "scores", "chosen", "pieces", "states", "pieces_done", "read_bytes"),
)
LONG_SIZES = ("token_capacity", "position_capacity", "num_blocks", "num_units", "num_parts", "most_chosen")
SIZES = (*LONG_SIZES, "num_kv_heads", "num_rows", "parts_per_block", "num_pieces", "cluster")


class Layer(Structure):
    """The tensors of a layer, of a token and of scratch memory, their sizes, the scale, and the soft cap (0: none)."""

    _fields_ = (
        *((name, c_void_p) for name in TENSORS),
        *((name, c_longlong if name in LONG_SIZES else c_int) for name in SIZES),
        ("scale", c_float),
        ("softcap", c_float),
    )

    def point(self, **tensors: Tensor | None) -> None:
        """Set the addresses of these tensors, which the caller keeps alive; None is the null pointer."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())
