"""The sizes of well-known models, which measurements need; the file imports no torch."""

from dataclasses import dataclass
from difflib import get_close_matches

from rocketkv.errors import InputError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder.

    Attributes:
        name: the name that the command line takes.
        model_type: the architecture's name in transformers.
        num_layers: the number of decoder layers.
        hidden_size: the number of channels of the residual stream.
        num_heads: the number of query heads, Hq.
        num_kv_heads: the number of KV heads, Hkv.
        head_dim: the number of channels of a key, D.
        intermediate_size: the number of channels inside the MLP.
        vocab_size: the number of tokens in the vocabulary.
        is_tied: True if the output layer's weights are the embedding.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool

    @property
    def token_elements(self) -> int:
        """The number of elements of the keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """The number of weights of the model, without its norms."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("llama-3.1-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, False),
        Geometry("llama-3.2-1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, True),
        Geometry("qwen3-8b", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False),
        Geometry("gemma3-270m", "gemma3_text", 18, 640, 4, 1, 256, 2048, 262144, True),
        Geometry("smollm2-135m", "llama", 30, 576, 9, 3, 64, 1536, 49152, True),
    )
}


def find_geometry(name: str) -> Geometry:
    """Return the geometry of this name.

    Raises:
        InputError: there is no such geometry.
    """
    if name not in GEOMETRIES:
        close = get_close_matches(name, GEOMETRIES, 3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(GEOMETRIES)}."
        raise InputError(f"geometry={name!r} does not exist; {hint}")
    return GEOMETRIES[name]
