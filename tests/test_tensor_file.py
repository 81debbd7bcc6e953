"""Files of tensors: any reader of safetensors opens them, and a damaged one is refused or right."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocketkv import CacheFileError
from rocketkv.tensor_file import PAGE, Rows, load, save

DAMAGES = int(os.environ.get("ROCKETKV_TEST_DAMAGES", "2000"))
RECORD = {"words": "é ✓", "numbers": [1, 2.5, None]}


def some_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor | Rows]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 40, 8, generator=generator).to(dtype)
    lengths = torch.tensor([[40, 7, 0], [1, 40, 39]])
    for row, length in zip(rows.flatten(0, 1), lengths.flatten().tolist(), strict=True):
        row[length:] = 77.0  # what lies beyond a length is of nobody's concern, and may be of another text
    return {
        "rows": Rows(rows, lengths, 64),
        "wide": torch.randn(3, 5, generator=generator).to(dtype).T,
        "ids": torch.arange(7, dtype=torch.int32).expand(2, 7),
        "mask": torch.tensor([[True, False]]),
        "nothing": torch.empty(2, 0, 8),
    }


def plain(tensors: dict[str, Tensor | Rows]) -> dict[str, Tensor]:
    """The tensors as they stand in a file."""
    expected: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if isinstance(x, Rows):
            used = torch.arange(x.tokens.shape[2]) < x.lengths[..., None]
            expected[name] = x.tokens.new_zeros(x.shape)
            expected[name][:, :, : x.tokens.shape[2]] = x.tokens.where(used[..., None], 0.0)
        else:
            expected[name] = x
    return expected


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_what_was_saved_is_loaded_and_any_reader_of_safetensors_opens_it(tmp_path: Path, dtype: torch.dtype) -> None:
    path, tensors = tmp_path / "file", some_tensors(dtype)
    save(path, tensors, RECORD)
    record, found = load(path)
    assert record == RECORD
    assert_same(found, plain(tensors))
    with safe_open(path, framework="pt") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys()}, plain(tensors))  # noqa: SIM118
    assert all(x.data_ptr() % x.element_size() == 0 for x in found.values())


def test_tensors_of_whole_pages_begin_at_pages(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones(2, PAGE),
        "c": torch.ones(1, dtype=torch.int64),
        "d": torch.ones(PAGE),
    }
    save(tmp_path / "file", tensors, {})
    _, found = load(tmp_path / "file")
    assert [found[name].data_ptr() % PAGE for name in "bd"] == [0, 0]
    content = (tmp_path / "file").read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % PAGE == 0


def test_what_is_written_to_a_tensor_changes_memory_alone(tmp_path: Path) -> None:
    save(tmp_path / "file", {"a": torch.zeros(2 * PAGE)}, {})
    found = [load(tmp_path / "file")[1]["a"] for _ in range(2)]
    found[0][5] = 1.0
    assert found[1].count_nonzero() == load(tmp_path / "file")[1]["a"].count_nonzero() == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_checking_a_file_takes_no_memory_for_holes_and_tensors(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "file"
    rows = torch.ones(1, 4, 100 * PAGE, 1)
    save(path, {"rows": Rows(rows, torch.full((1, 4), 50 * PAGE), 150 * PAGE)}, {})

    def resident_kib() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        sizes = [next(line for line in lines if line.startswith("Rss:")) for line in lines if line.endswith(str(path))]
        return sum(int(size.split()[1]) for size in sizes)

    _, found = load(path)
    assert resident_kib() <= 128
    assert found["rows"].sum() == 4 * 50 * PAGE
    assert resident_kib() >= 4 * 50 * PAGE * 4 // 1024


def test_what_is_no_saved_cache_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Once upon a time.\n" * 9)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("missing", "is not there; give the path of a saved cache"),
        ("empty", "is no saved cache, or is damaged"),
        ("text", "is no saved cache, or is damaged"),
        (".", "is no file; give the path"),
        ("pipe", "is no file; give the path"),
        ("other.safetensors", "is a safetensors file, but no saved cache"),
    ):
        with pytest.raises(CacheFileError, match=reason) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content of a file with one thing wrong in it."""
    size = 8 + int.from_bytes(content[:8], "little")
    kind = chance.choice(("bit", "bit of the header", "byte", "cut", "more", "zeros", "moved", "length", "entry"))
    changed = bytearray(content)
    place = chance.randrange(len(content) if kind != "bit of the header" else len(content[:size].rstrip()))
    if kind.startswith("bit"):
        changed[place] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        changed[place] = chance.randrange(256)
    elif kind == "cut":
        del changed[place:]
    elif kind == "more":
        changed += chance.randbytes(chance.randrange(1, 99))
    elif kind == "zeros":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif kind == "moved":
        changed[place:place] = chance.randbytes(chance.randrange(1, 9))
    elif kind == "length":
        changed[:8] = chance.choice((0, 1, size, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    else:
        header = json.loads(content[8:size])
        name = chance.choice(list(header))
        key = chance.choice(list(header[name]))
        header[name][key] = chance.choice(
            ("", "F32", "I64", "{}", "0" * 64, 3, [], [1, 2], [0, 2**40], [-1, 5], None, *header[name].values())
        )
        text = json.dumps(header).encode()
        changed[8:size] = text + b" " * (size - 8 - len(text))
        changed[:8] = max(size - 8, len(text)).to_bytes(8, "little")
    return bytes(changed)


def test_a_damaged_file_is_refused_or_right(tmp_path: Path) -> None:
    """`ROCKETKV_TEST_DAMAGES=100000` for the long run."""
    path, expected = tmp_path / "file", plain(some_tensors())
    save(path, some_tensors(), RECORD)
    content, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(DAMAGES):
        path.write_bytes(damaged(content, chance))
        try:
            record, found = load(path)
        except CacheFileError:
            refused += 1
            continue
        assert record == RECORD
        assert_same(found, expected)
    assert refused > 0.8 * DAMAGES


def test_a_file_that_is_removed_meanwhile_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    save(path, some_tensors(), RECORD)
    look = Path.stat

    def look_and_remove(self: Path, **options: bool) -> os.stat_result:
        status = look(self, **options)
        if self == path:
            path.unlink()
        return status

    monkeypatch.setattr(Path, "stat", look_and_remove)
    with pytest.raises(CacheFileError, match="is not there") as caught:
        load(path)
    assert isinstance(caught.value.__context__, FileNotFoundError)  # by which a store tells that from damage
