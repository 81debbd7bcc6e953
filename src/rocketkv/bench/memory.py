"""Measures the memory of a prefill and of decoding, with the full cache and with ours, each in its own process."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocketkv.errors import RocketKVError
from rocketkv.hf.versions import pass_cache

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        geometry: a name of `GEOMETRIES`.
        dtype: the torch name of the dtype of weights and cache.
        phase: `prefill` for one forward pass of the prompt; `decode` for two steps after a prompt that is not computed.
        cache: `full` for transformers' own cache; `rocketkv` for ours.
        seq_len: the number of tokens of the prompt.
        token_budget: the budget in tokens; None for `full`.
        batch: the number of rows.
    """

    geometry: str
    dtype: str
    phase: str
    cache: str
    seq_len: int
    token_budget: int | None
    batch: int

    def __str__(self) -> str:
        return f"{self.phase} S={self.seq_len} batch={self.batch}, {self.cache}"


def measure_memory(case: Case) -> dict[str, object]:
    """Measure a case in its own process, so that no other memory counts.

    Returns:
        `name`, as in `decode_rocketkv`; `kv_bytes`, held by the cache; `peak_rss_bytes`, the most that the process has
        held; `model_rss_bytes`, the same before there was a cache; and the fields of the case.

    Raises:
        InputError: the case does not fit in memory.
        RocketKVError: the process failed.
    """
    _check(case)
    command = [sys.executable, "-m", "rocketkv.bench.memory", json.dumps(asdict(case))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
        raise RocketKVError(f"the memory of {case.phase} with the {case.cache} cache cannot be measured ({reason}).")
    record: dict[str, object] = json.loads(result.stdout)
    return record


def cases(
    geometry: str,
    dtype: str,
    phases: list[str],
    seq_lens: list[int],
    prefill_lens: list[int],
    budgets: list[int],
    batches: list[int],
) -> Iterator[Case]:
    """Yield all cases of a sweep, with the full cache once for all budgets."""
    for phase in phases:
        for seq_len in prefill_lens if phase == "prefill" else seq_lens:
            for batch in batches:
                yield Case(geometry, dtype, phase, "full", seq_len, None, batch)
                for budget in budgets:
                    yield Case(geometry, dtype, phase, "rocketkv", seq_len, budget, batch)


def _check(case: Case) -> None:
    import torch

    from rocketkv.bench.device import check_memory
    from rocketkv.bench.geometries import find_geometry

    geometry = find_geometry(case.geometry)
    size = getattr(torch, case.dtype).itemsize
    layers = geometry.num_layers + 1 if case.cache == "full" else 1 + geometry.num_layers // 4
    cache_bytes = case.batch * case.seq_len * layers * geometry.token_elements * size
    what = f"{case.phase} of {case.seq_len} tokens x batch {case.batch} with the {case.cache} cache"
    check_memory(what, geometry.num_parameters * size + cache_bytes)


def run_case(case: Case) -> dict[str, object]:
    """Measure a case in this process; `measure_memory` starts a process that calls this function."""
    import torch
    from transformers import DynamicCache

    from rocketkv.bench.geometries import find_geometry
    from rocketkv.bench.model import build_model, decode_step, full_cache, our_cache, sizes_of
    from rocketkv.bench.tensors import kept_tokens, same_tokens, sparse_config
    from rocketkv.hf import RocketKVCache, cache_stats
    from rocketkv.hf.switch import enable

    model = enable(build_model(find_geometry(case.geometry), getattr(torch, case.dtype)))
    sizes = sizes_of(model)
    decode_step(model, None, torch.ones(case.batch, 1, dtype=torch.int64))
    model_rss_bytes = peak_rss_bytes()
    config = None if case.token_budget is None else sparse_config(case.token_budget)
    cache: Any
    if case.phase == "prefill":
        cache = DynamicCache(config=model.config) if config is None else RocketKVCache(model.config, config)
        input_ids = torch.randint(0, model.config.vocab_size, (case.batch, case.seq_len))
        with torch.inference_mode():
            model(input_ids=input_ids, **pass_cache(cache), logits_to_keep=1)
    else:
        kept = case.seq_len if config is None else kept_tokens(config, case.seq_len)
        keys = same_tokens(case.batch, sizes.num_kv_heads, kept, sizes.head_dim, model.dtype)
        cache = full_cache(model, keys, keys) if config is None else our_cache(model, config, keys, keys, case.seq_len)
        for _ in range(2):
            decode_step(model, cache, torch.ones(case.batch, 1, dtype=torch.int64))
    return {
        "name": f"{case.phase}_{case.cache}",
        **asdict(case),
        "kv_bytes": cache_stats(cache).total.kv_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "model_rss_bytes": model_rss_bytes,
        "weight_bytes": sizes.weight_bytes,
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has held.

    Linux's `ru_maxrss` begins with what the parent held when it started this process, so its own count comes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(run_case(Case(**json.loads(sys.argv[1])))))
