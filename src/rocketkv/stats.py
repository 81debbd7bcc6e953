"""What a cache holds and reads, beside what a full one would; plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """What one layer holds and reads, or all of them.

    Attributes:
        num_seen: tokens seen, padding left out; mean over rows (and layers).
        num_stored: tokens that decode chooses from, in a sliding-window layer its window; mean over rows and KV heads
            (and layers).
        kv_bytes: bytes allocated: keys, values, positions, archive and index.
        read_bytes: bytes that the last decode step had to read; 0 before the first.
        full_kv_bytes: what an uncompressed cache would hold.
        full_read_bytes: what it would read in a step.
    """

    num_seen: float = 0.0
    num_stored: float = 0.0
    kv_bytes: int = 0
    read_bytes: int = 0
    full_kv_bytes: int = 0
    full_read_bytes: int = 0

    @property
    def retained_fraction(self) -> float:
        """Bytes held as a fraction of what an uncompressed cache would hold."""
        return self.kv_bytes / max(1, self.full_kv_bytes)

    @property
    def compression_factor(self) -> float:
        """How many times fewer bytes a decode step reads than with an uncompressed cache."""
        return self.full_read_bytes / max(1, self.read_bytes)


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds and reads: layer by layer, and in all."""

    layers: list[LayerStats]

    @property
    def total(self) -> LayerStats:
        """Bytes summed over all layers, tokens averaged."""
        count = max(1, len(self.layers))
        return LayerStats(
            num_seen=sum(layer.num_seen for layer in self.layers) / count,
            num_stored=sum(layer.num_stored for layer in self.layers) / count,
            kv_bytes=sum(layer.kv_bytes for layer in self.layers),
            read_bytes=sum(layer.read_bytes for layer in self.layers),
            full_kv_bytes=sum(layer.full_kv_bytes for layer in self.layers),
            full_read_bytes=sum(layer.full_read_bytes for layer in self.layers),
        )
