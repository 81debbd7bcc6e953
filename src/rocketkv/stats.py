"""Plain numbers of what a cache stores and reads, beside what a full cache would."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """What one layer, or all layers together, store and read.

    Attributes:
        num_seen: the number of tokens seen, padding left out, as the mean over rows (and layers).
        num_stored: the number of kept tokens, or of tokens in the window of a sliding-window layer, as the mean over
            rows and KV heads (and layers).
        kv_bytes: the bytes allocated for keys, values, positions, archive and index.
        read_bytes: the bytes that the last decode step had to read; 0 before the first step.
        full_kv_bytes: the bytes that an uncompressed cache would store.
        full_read_bytes: the bytes that a decode step over an uncompressed cache would read.
        num_image_seen: how many of `num_seen` stand for images or videos; the others are text. 0 outside of a model.
        num_image_stored: how many of `num_stored` do.
    """

    num_seen: float = 0.0
    num_stored: float = 0.0
    kv_bytes: int = 0
    read_bytes: int = 0
    full_kv_bytes: int = 0
    full_read_bytes: int = 0
    num_image_seen: float = 0.0
    num_image_stored: float = 0.0

    @property
    def retained_fraction(self) -> float:
        """The bytes allocated as a fraction of the bytes that an uncompressed cache would store."""
        return self.kv_bytes / max(1, self.full_kv_bytes)

    @property
    def compression_factor(self) -> float:
        """The bytes that a step over an uncompressed cache reads, over the bytes that the last step read."""
        return self.full_read_bytes / max(1, self.read_bytes)


@dataclass(frozen=True)
class CacheStats:
    """What a cache stores and reads, layer by layer and in all."""

    layers: list[LayerStats]

    @property
    def total(self) -> LayerStats:
        """The sum of the bytes of all layers, and the mean numbers of tokens of those that have any."""
        count = max(1, sum(layer.num_seen + layer.num_stored > 0 for layer in self.layers))
        return LayerStats(
            num_seen=sum(layer.num_seen for layer in self.layers) / count,
            num_stored=sum(layer.num_stored for layer in self.layers) / count,
            kv_bytes=sum(layer.kv_bytes for layer in self.layers),
            read_bytes=sum(layer.read_bytes for layer in self.layers),
            full_kv_bytes=sum(layer.full_kv_bytes for layer in self.layers),
            full_read_bytes=sum(layer.full_read_bytes for layer in self.layers),
            num_image_seen=sum(layer.num_image_seen for layer in self.layers) / count,
            num_image_stored=sum(layer.num_image_stored for layer in self.layers) / count,
        )
