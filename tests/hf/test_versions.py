"""Tests of the differences between versions of transformers, and of the warning for untested versions."""

import warnings
from importlib.metadata import version

import pytest
import torch
from packaging.specifiers import SpecifierSet

from rocketkv import InputError, RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf import switch, versions
from rocketkv.hf.versions import CACHE_ARGUMENT, CACHE_ARGUMENTS, dependency, pass_cache
from tiny import prompts, tiny_model

CONFIG = RocketKVConfig(token_budget=26, window_size=8, kernel_size=5)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_versions_at_hand_are_compared_with_those_of_the_metadata(name: str) -> None:
    found = dependency(name)
    assert found.installed == version(name)
    assert found.is_tested == SpecifierSet(found.tested).contains(found.installed.partition("+")[0])
    assert found.tested.startswith(">=")
    assert "<" in found.tested


@pytest.mark.parametrize(
    ("installed", "is_tested"),
    [("5.16.0", True), ("5.24.3", True), ("5.24.0rc1", True), ("5.15.9", False), ("5.999.0", False), ("6.0.0", False)],
)
def test_only_the_claimed_range_counts_as_tested(
    installed: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    assert dependency("transformers").is_tested == is_tested


def test_enable_warns_once_of_a_version_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "5.999.0")
    switch._warn_if_untested.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"transformers 5\.999\.0 is not among .* >=5\.16,<5\.25"):
            enable(tiny_model("llama"))
        enable(tiny_model("llama"))  # a warning would be an error here
    finally:
        switch._warn_if_untested.cache_clear()


def test_a_pass_that_no_hook_has_seen_is_refused_with_the_tested_versions() -> None:
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=r"no hook .* >=5\.16,<5\.25") as refused:
        model(input_ids=prompts(20)[0], **pass_cache(RocketKVCache(model.config, CONFIG)))
    assert "not enabled" not in str(refused.value)


@torch.inference_mode()
def test_the_other_name_of_the_argument_is_taken_or_refused_but_never_ignored() -> None:
    model = enable(tiny_model("llama"))
    ids = prompts(60)[0]
    (other,) = set(CACHE_ARGUMENTS) - {CACHE_ARGUMENT}
    cache = RocketKVCache(model.config, CONFIG)
    if CACHE_ARGUMENT == "cache":  # transformers takes the old name, with a warning of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model(input_ids=ids, **{other: cache})
        assert cache.get_seq_length() == 60
    else:
        with pytest.raises(InputError, match=r"ignores cache=; pass past_key_values=cache\."):
            model(input_ids=ids, **{other: cache})
        assert cache.get_seq_length() == 0
