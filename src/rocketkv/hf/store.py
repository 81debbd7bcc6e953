"""Caches of texts that were read before: a new text goes on from the longest beginning that it shares with one."""

import hashlib
import json
import warnings
from os import PathLike
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv import tensor_file
from rocketkv.config import RocketKVConfig
from rocketkv.errors import CacheFileError, InputError, UnsupportedError
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.history import UNKNOWN, History
from rocketkv.hf.past import SavedPast
from rocketkv.hf.saved import identify, options_of
from rocketkv.hf.shelf import SUFFIX, Folder, Memory, Shelf
from rocketkv.hf.support import check_model

MAX_BYTES = 8 * 2**30


class PrefixStore:
    """Keeps caches by the token ids that they have seen, and gives forks of them.

    Many questions about one document, and chat templates that rewrite the last turn, then read the document once. A
    fork shares the archive of a `multi_turn` cache with all others, on the CPU: what it costs is its working set and
    the tokens that it adds. Threads may share a store, and processes a folder.

    Args:
        model: the model whose caches these are; caches of other models in the folder are left alone.
        config: how the caches compress. `multi_turn` caches go back to any token; `single_turn` ones, and those of
            models with sliding windows or recurrent states, serve only texts that begin with all that they have seen.
        folder: where the caches are kept as files, readable by their owner alone; None: in the memory of this process.
        max_bytes: what the stored caches may take together; beyond it the least recently used are given up.

    Attributes:
        config: as given.

    Raises:
        InputError: the folder cannot be made.
        UnsupportedError: the model is not supported, or `config` has an eviction or a selection of your own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RocketKVConfig,
        *,
        folder: str | PathLike[str] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.config = config
        self._model = model
        self._identity = identify(check_model(model))
        made_by = [tensor_file.VERSION, *self._identity[1:], options_of(config)]
        self._key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]
        self._shelf: Shelf = Memory(max_bytes) if folder is None else Folder(Path(folder), max_bytes)
        self._pasts: dict[str, SavedPast] = {}  # of the files seen so far; a name has its ids in it
        self._checked: set[tuple[str, int, int]] = set()  # name, inode and bytes of files whose checksums fit
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """The bytes of all stored caches, those of other models in the folder included."""
        with self._lock:
            return sum(self._shelf.sizes().values())

    def get(self, ids: Tensor, attention_mask: Tensor | None = None) -> RocketKVCache:
        """Return a cache that has seen the longest beginning of a text that is left of a stored one, or an empty one.

        Args:
            ids: `[B, L]` integers, the text so far, as it will be given to `generate` together with the cache; so one
                token at least is left to take in, as `RocketKVCache.rewind_to` says.
            attention_mask: `[B, L]`, 0 in padded columns, as it will be given to `generate`; None: no column is padded.
                Texts share a beginning only where the same columns are padded.

        Raises:
            OutOfMemoryError: there is no memory for the cache; the stored one stays.
        """
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        with self._lock:
            found, paths = [], self._own_paths()
            self._pasts = {name: past for name, past in self._pasts.items() if name in paths}
            for name, path in paths.items():
                past = self._past(name, path)
                if past is not None and past.history.num_rows == ids.shape[0] and _pads_alike(past.history, mask):
                    left = past.columns_left(ids, self.config.window_size)
                    found.append((left, -past.history.num_columns, name, path))
            for left, _, name, path in sorted(found, reverse=True):
                cache = self._load(name, path) if left > 0 else None
                if cache is not None and self._goes_back(cache, ids):
                    self._shelf.touch(name)
                    return cache
        return RocketKVCache(self._model.config, self.config)

    def put(self, cache: RocketKVCache) -> None:
        """Keep what a cache has seen; the cache itself goes on as it is.

        Raises:
            InputError: another model has filled the cache, it compresses otherwise, or a token of it has no id.
            CacheFileError: the folder cannot be written.
        """
        tensors, record = cache.parts()
        if record["model"] != self._identity._asdict() or cache.config != self.config:
            raise InputError("the cache is of another model or configuration than the store; give one of get().")
        history = cache.history
        if bool((history.ids == UNKNOWN).any()):
            raise InputError("some tokens of the cache came without ids, by which a store knows texts; leave it out.")
        digest = hashlib.sha256(history.ids.cpu().numpy().tobytes())
        digest.update(repr(history.ids.shape).encode())
        if history.mask is not None:
            digest.update(history.mask.cpu().numpy().tobytes())
        name = f"{self._key}-{digest.hexdigest()[:32]}{SUFFIX}"
        with self._lock:
            is_kept = self._shelf.touch(name) or self._shelf.add(name, tensors, record)
        if not is_kept:
            warnings.warn(
                f"a cache takes more than the max_bytes={self._shelf.max_bytes} of its store, so it was not kept; "
                "raise max_bytes.",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Give up all stored caches, those of other models in the folder included; forks stay whole."""
        with self._lock:
            self._shelf.clear()

    def _own_paths(self) -> dict[str, Path]:
        """Return the paths of the caches of this model and configuration."""
        return {name: path for name, path in self._shelf.paths().items() if name.startswith(self._key)}

    def _past(self, name: str, path: Path) -> SavedPast | None:
        """Return what a stored cache has seen; None if its file is gone or damaged."""
        if name not in self._pasts:
            try:
                self._pasts[name] = SavedPast.read(*tensor_file.load(path, check=False))
            except CacheFileError as error:
                self._give_up(name, error)
                return None
            except (KeyError, TypeError, ValueError) as error:
                self._give_up(name, CacheFileError(f"{name} holds no cache ({error!r})"))
                return None
        return self._pasts[name]

    def _load(self, name: str, path: Path) -> RocketKVCache | None:
        """Return a fork of a stored cache; None if its file is gone or damaged."""
        try:
            status = path.stat()
            version = (name, status.st_ino, status.st_size)
            parts = tensor_file.load(path, check=version not in self._checked)
            cache = RocketKVCache.from_parts(path, self._model, *parts, own=self._identity)
        except OSError:  # another process has given the file up, or the system has no room for the moment
            return None
        except CacheFileError as error:
            self._give_up(name, error)
            return None
        self._checked.add(version)
        return cache

    def _give_up(self, name: str, error: Exception) -> None:
        """Remove a file that cannot be used, and say so, unless another process has given it up."""
        if not isinstance(error.__context__ or error, FileNotFoundError):
            self._shelf.remove(name)
            warnings.warn(f"a stored cache was removed, as it cannot be used: {error}", stacklevel=4)

    @staticmethod
    def _goes_back(cache: RocketKVCache, ids: Tensor) -> bool:
        """Take a fork back to what it shares with a text; return whether anything is left."""
        try:
            return cache.rewind_to(ids) > 0
        except (InputError, UnsupportedError):  # another process has put another cache of the same text in its place
            return False


def _pads_alike(history: History, mask: Tensor) -> bool:
    """Return whether the columns that a history and a text of this mask, `[B, L]`, both have are padded alike."""
    own = torch.ones_like(history.ids) if history.mask is None else history.mask
    width = min(own.shape[1], mask.shape[1])
    return torch.equal(own[:, :width].bool().cpu(), mask[:, :width].bool().cpu())
