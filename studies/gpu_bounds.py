"""Counts what the GPU kernels must move and compute, and prints the tables of docs/gpu.md. The count needs no GPU.

    .venv/bin/python studies/gpu_bounds.py

The model is Llama-3.1-8B in bfloat16. "Memory" is what any kernels must read from or write to the GPU's memory:
index, chosen tokens, queries and outputs. "Scratch" is what our three kernels pass to each other; the scratch is
small enough to stay in the second-level cache. Operations are counted per program, as a program runs on one core.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rocketkv.backends.triton.sizes import (
    DIGIT,
    LEAST_DOT,
    LEAST_PARTS,
    LEAST_WINDOW_PART,
    PART,
    PROGRAMS_PER_CORE,
    SCORING_PROGRAMS_PER_CORE,
    TILE,
)
from rocketkv.bench.geometries import GEOMETRIES
from rocketkv.config import RocketKVConfig
from rocketkv.eval.report.markdown import table
from rocketkv.ops.lowbit import GROUP

MODEL = GEOMETRIES["llama-3.1-8b"]
ELEMENT = 2  # bytes
LENGTHS, BUDGETS, BATCHES = (16384, 32768, 65536, 131072), (256, 512), (1, 8, 32)
SELECTIONS = ("lowbit", "hybrid")
# The operations of `tl.histogram` per number, from how Triton compiles it for warps of 32 lanes: a test and a ballot of
# each bit, the choice of the lane's bins by five of the bits, and a mask, a population count and a sum for each bin.
HISTOGRAM = 3 * DIGIT + 2 * 5 + 5 * 2**DIGIT // 32


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bytes per second, cores (multiprocessors, compute units), Hz, integer lanes per core."""

    name: str
    bandwidth: float
    cores: int
    clock: float
    lanes: int = 64

    def read_us(self, num_bytes: float) -> float:
        """Return the least microseconds that moving so many bytes takes."""
        return 1e6 * num_bytes / self.bandwidth

    def compute_us(self, operations: float, programs: int) -> float:
        """Return the microseconds that so many integer operations per program take, one program to a core."""
        return 1e6 * operations * -(-programs // self.cores) / (self.lanes * self.clock)


GPUS = (
    Gpu("A100", 2.04e12, 108, 1.41e9),
    Gpu("H100", 3.35e12, 132, 1.98e9),
    Gpu("MI300X", 5.3e12, 304, 2.1e9),
)


@dataclass(frozen=True)
class Work:
    """The work of a kernel for one KV head of one row.

    Attributes:
        name: the kernel's name.
        memory: the bytes from and to the GPU's memory.
        scratch: the bytes that the kernels write for and read from each other.
        programs: the number of programs that share the head.
        operations: the simple integer and floating-point operations of a program, outside matrix products.
        products: the floating-point operations of its matrix products, padded to 16 rows, two per multiplication.
    """

    name: str
    memory: int
    scratch: int
    programs: int
    operations: int
    products: int


def kernels(selection: str, seq_len: int, token_budget: int, batch: int, cores: int = 132) -> Iterator[Work]:
    """Return the three kernels of a decode step after a prompt of so many tokens."""
    group, dim = MODEL.num_heads // MODEL.num_kv_heads, MODEL.head_dim
    config = RocketKVConfig(token_budget=token_budget, selection=selection)
    budget = config.budget_for(seq_len, dim)
    held, size, num_channels, top_k = budget
    units = -(-held // size)
    part = GROUP if selection == "lowbit" else PART
    parts, heads = -(-units // part), batch * MODEL.num_kv_heads
    parts_per_program = max(LEAST_PARTS, heads * parts // (SCORING_PROGRAMS_PER_CORE * cores))
    programs = -(-parts // parts_per_program)
    parts_of_one = min(parts, parts_per_program)
    sizes = (torch.tensor([[number]]) for number in (held, size, num_channels))
    index = int(config.selection_method().scored_bytes(*sizes, dim, ELEMENT))
    query = group * dim * ELEMENT
    logits, partials = 4 * group * units, 8 * group * parts
    # A step reads and writes the new key and value, and writes the key to the open group.
    appended = (2 + 2 + (selection == "lowbit")) * dim * ELEMENT
    choice = dim * dim + 4 * group * dim  # channels, each of which is compared with each other
    unpacked = 3 * part * num_channels if selection == "lowbit" else 0
    # A program reads the query for the choice of channels and for its products, with low-bit keys part by part.
    query_reads = programs + (parts if selection == "lowbit" else programs)
    yield Work(
        "append_and_score",
        index + query + appended,
        logits + partials + (query_reads - 1) * query,
        programs,
        choice + parts_of_one * (unpacked + 8 * part * group),
        parts_of_one * 2 * LEAST_DOT * part * dim,
    )
    walks = 32 // DIGIT  # the first of them writes the scores, the others read them, and so does the walk that chooses
    yield Work(
        "choose",
        0,
        logits + partials + 4 * units * (walks + 1) + 4 * top_k,
        1,
        8 * group * units + walks * (8 + HISTOGRAM) * units + 12 * held,
        0,
    )
    pieces = min(-(-top_k // TILE), max(1, PROGRAMS_PER_CORE * cores // heads))
    tokens = -(-top_k // pieces)
    yield Work(
        "attend",
        2 * top_k * dim * ELEMENT + 2 * query,
        4 * top_k + 2 * 4 * pieces * group * (dim + 2),
        pieces,
        16 * group * tokens + 4 * pieces * group * dim,
        2 * 2 * LEAST_DOT * tokens * dim,
    )


def prefill_kernels(seq_len: int, token_budget: int) -> Iterator[Work]:
    """Return the kernels that run once after a prompt: two for stage 1's scores, and those of the low-bit keys."""
    group, dim, window = MODEL.num_heads // MODEL.num_kv_heads, MODEL.head_dim, 32
    rows, parts = group * window, -(-seq_len // LEAST_WINDOW_PART)
    keys, partials = seq_len * dim * ELEMENT, 8 * rows * parts
    tokens = min(seq_len, LEAST_WINDOW_PART)
    row_groups = -(-rows // PART)
    yield Work(
        "sum_window",
        keys,
        partials + (row_groups - 1) * keys,
        parts * row_groups,
        8 * PART * tokens,
        2 * PART * tokens * dim,
    )
    yield Work(
        "score_window",
        keys + 4 * seq_len,
        parts * partials + (row_groups - 1) * keys + 8 * row_groups * seq_len,
        parts * row_groups,
        8 * PART * tokens + 8 * PART * parts,
        2 * PART * tokens * dim,
    )
    held = RocketKVConfig(token_budget=token_budget).budget_for(seq_len, dim).kept_tokens
    index = held * dim // 2 + -(-held // GROUP) * dim * 2 * ELEMENT
    yield Work("build_lowbit", held * dim * ELEMENT + index, 0, -(-held // GROUP), 12 * GROUP * dim, 0)


def main() -> None:
    """Print the tables."""
    heads = MODEL.num_kv_heads
    print("## One KV head of one row, 65,536 tokens, batch 1\n")
    rows = [
        [f"{selection}, t = {budget}", work.name, *(f"{value:,}" for value in list(vars(work).values())[1:])]
        for selection in SELECTIONS
        for budget in BUDGETS
        for work in kernels(selection, 65536, budget, 1)
    ]
    header = ["", "kernel", "memory, B", "scratch, B", "programs", "operations of one", "in products"]
    print(table(header, rows) + "\n")

    print("## The same, once after the prompt, t = 512\n")
    rows = [
        [work.name, *(f"{value:,}" for value in list(vars(work).values())[1:])] for work in prefill_kernels(65536, 512)
    ]
    print(table(header[1:], rows) + "\n")

    print("## A step of all 32 layers, least microseconds by memory: A100 / H100 / MI300X\n")
    for selection in SELECTIONS:
        rows = []
        for seq_len in LENGTHS:
            for batch in BATCHES:
                dense = 2 * seq_len * MODEL.head_dim * ELEMENT
                cells = [
                    sum(work.memory for work in kernels(selection, seq_len, budget, batch)) for budget in BUDGETS
                ] + [dense]
                scale = batch * heads * MODEL.num_layers
                times = [" / ".join(f"{gpu.read_us(cell * scale):,.0f}" for gpu in GPUS) for cell in cells]
                rows.append([f"{seq_len:,}", f"{batch}", f"{cells[0] * scale / 1e6:,.0f}", *times])
        header = ["S", "batch", "MB at t = 256", *(f"{selection}, t = {budget}" for budget in BUDGETS), "all tokens"]
        print(table(header, rows) + "\n")

    print("## `choose` alone, all 32 layers, microseconds of computation: A100 / H100 / MI300X\n")
    rows = []
    for selection in SELECTIONS:
        for seq_len in LENGTHS:
            times = []
            for batch in BATCHES:
                work = list(kernels(selection, seq_len, 512, batch))[1]
                us = [MODEL.num_layers * gpu.compute_us(work.operations, batch * heads) for gpu in GPUS]
                times.append(" / ".join(f"{each:,.0f}" for each in us))
            rows.append([f"{selection}, S = {seq_len:,}, t = 512", *times])
    print(table(["", *(f"batch {batch}" for batch in BATCHES)], rows))


if __name__ == "__main__":
    main()
