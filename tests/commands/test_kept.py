"""`generate --show-kept`: the picture of what a cache keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from rocketkv import LayerCache, RocketKVConfig
from rocketkv.commands import kept
from rocketkv.hf import RocketKVCache
from rocketkv.hf.history import History
from tiny import CONFIGS, save_tiny


@pytest.fixture
def cache(seeded: torch.Generator) -> RocketKVCache:
    """A cache of three layers that has seen 300 tokens and keeps some of them, and decoded one more."""
    made = RocketKVCache(CONFIGS["llama"], RocketKVConfig(token_budget=10, window_size=4, kernel_size=3))
    for layer in made.compressed_layers:
        assert isinstance(layer.cache, LayerCache)
        keys = torch.randn(1, 2, 300, 16, generator=seeded)
        layer.cache.prefill(torch.randn(1, 4, 300, 16, generator=seeded), keys, keys)
        layer.cache.decode(torch.randn(1, 4, 1, 16, generator=seeded), keys[:, :, :1], keys[:, :, :1])
    return made


def test_the_shares_are_those_of_the_heads_that_keep_a_token(cache: RocketKVCache) -> None:
    shares = kept.kept_shares(cache)
    counts = torch.zeros(301)
    for layer in cache.compressed_layers:
        working = layer.cache.working
        assert working is not None
        for head in range(2):
            for position in working.positions[0, head, : int(working.lengths[0, head])].tolist():
                counts[position] += 1
    assert torch.equal(shares, counts / 6)
    assert shares[-1] == 1.0  # the decoded token
    assert 0 < int((counts == 0).sum()) < 300


@pytest.mark.parametrize(("ascii_only", "marks"), [(True, " .+#@"), (False, " \u2591\u2592\u2593\u2588")])
def test_the_line_is_darker_where_more_heads_keep(
    cache: RocketKVCache, monkeypatch: pytest.MonkeyPatch, ascii_only: bool, marks: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shares = torch.tensor([0.0] * 4 + [0.1, 0.3, 0.3, 0.3] + [1.0] * 4)
    monkeypatch.setattr(kept, "kept_shares", lambda _: shares)
    monkeypatch.setattr(Console, "options", property(lambda _: type("", (), {"ascii_only": ascii_only})))
    monkeypatch.setattr(Console, "width", property(lambda _: 5))
    line, legend = kept.kept_line(cache).plain.split("\n")
    assert line == f"|{marks[0]}{marks[2]}{marks[4]}|"
    assert "4 tokens a mark" in legend


def test_images_are_marked_below_the_line(cache: RocketKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.model_config = LlamaConfig(image_token_id=5)
    ids = torch.zeros(1, 301, dtype=torch.int64)
    cache.history.append(ids, None)
    monkeypatch.setattr(Console, "width", property(lambda _: 62))  # six tokens a mark
    assert "^" not in kept.kept_line(cache).plain
    cache.history = History()
    ids[0, 100:150] = 5
    cache.history.append(ids, None)
    line, below, _, legend = kept.kept_line(cache).plain.split("\n")
    assert below == " " + " " * 16 + "^" * 9 + " " * 26
    assert len(line) == 53
    shares = kept.kept_shares(cache)
    text = torch.cat([shares[:100], shares[150:]])
    assert f"{float(shares[100:150].mean()):.0%} of the heads keep such a token" in legend
    assert f"{float(text.mean()):.0%} keep one of the text" in legend


def test_generate_draws_it(run: Any, document: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    Path(document).write_text(Path(document).read_text()[:1000])
    arguments = ("generate", "-f", document, "-q", "What?", "-m", str(tmp_path / "model"), "-t", "64")
    result = run(*arguments, "--max-new-tokens", "4", "--show-kept")
    assert result.exit_code == 0, result.output
    picture = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(picture) == 1
    assert 40 < len(picture[0]) <= 80
    assert "tokens a mark" in result.stdout
