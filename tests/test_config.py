import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

import rocketkv
from caches import SMALL
from rocketkv import Budget, ConfigError, LayerCache, RocketKVConfig
from rocketkv.eviction import KeepAll, SnapKV
from rocketkv.paper import split_budget
from rocketkv.selection import Exact, LowBit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"token_budget": 16},
            "token_budget=16 is smaller than window_size=32; raise token_budget or lower window_size.",
        ),
        ({"token_budget": 0}, "token_budget=0 is too small; give 1 or more."),
        ({"token_budget": 10**20}, "token_budget=100000000000000000000 is too large; give at most 1000000000000."),
        ({"token_budget": 2.5}, "token_budget=2.5 is not a whole number; give 1 or more."),
        ({"token_budget": True}, "token_budget=True is not a whole number; give 1 or more."),
        ({"token_budget": 256, "mode": "multi"}, "mode='multi' does not exist; did you mean multi_turn?"),
        (
            {"token_budget": 256, "archive_on_host": True},
            "archive_on_host=True needs an archive; set mode='multi_turn' or archive_on_host=False.",
        ),
        ({"token_budget": 256, "eviction": "snap"}, "eviction='snap' does not exist; did you mean snapkv?"),
        (
            {"token_budget": 256, "selection": "zzz"},
            "selection='zzz' does not exist; choose from dense, exact, quest, sparq, hybrid, hybrid_paper, lowbit.",
        ),
        (
            {"token_budget": 256, "kernel_size": 64},
            "kernel_size=64 is even; give an odd number.",
        ),
        (
            {"token_budget": 256, "sink_tokens": 200, "recent_tokens": 57},
            "sink_tokens + recent_tokens = 257 is more than the 256 tokens that a step may attend to; "
            "pin fewer or raise token_budget.",
        ),
        ({"token_budget": 256, "sink_tokens": -1}, "sink_tokens=-1 is too small; give 0 or more."),
        ({"token_budget": 256, "new_tokens": -1}, "new_tokens=-1 is too small; give 0 or more."),
        (
            {"token_budget": 256, "budget": (9, 1, 1, 9)},
            "budget=(9, 1, 1, 9) is no rocketkv.Budget; give one, or None to use the formulas.",
        ),
        ({"token_budget": 256, "budget": Budget(9, 0, 1, 9)}, "budget.page_size=0 is too small; give 1 or more."),
        (
            {"token_budget": 256, "window": 16},
            "window is not an option of RocketKVConfig; did you mean window_size?",
        ),
    ],
)
def test_errors_are_full_sentences(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RocketKVConfig(**options)
    assert str(error.value) == message


def test_objects_without_the_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no method keep"):
        RocketKVConfig(token_budget=256, eviction=object())
    with pytest.raises(ConfigError, match="lacks kept_tokens, split, build_index, logits, scored_bytes; give a name"):
        RocketKVConfig(token_budget=256, selection=object())


def test_unknown_options_are_type_errors_too() -> None:
    with pytest.raises(TypeError):
        RocketKVConfig(token_budget=256, topk=3)


def test_is_frozen_and_keyword_only_and_copies() -> None:
    config = RocketKVConfig(token_budget=256)
    with pytest.raises(FrozenInstanceError):
        config.token_budget = 3  # type: ignore[misc] # which is read-only
    with pytest.raises(TypeError):
        RocketKVConfig(256)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_paper_pins_nothing_and_takes_further_options() -> None:
    config = RocketKVConfig.paper(128, new_tokens=7)
    assert (config.token_budget, config.sink_tokens, config.recent_tokens, config.new_tokens) == (128, 0, 0, 7)
    with pytest.raises(ConfigError, match="is not an option"):
        RocketKVConfig.paper(128, nope=1)


def test_own_objects_are_used_as_they_are() -> None:
    policy, method = KeepAll(), Exact()
    cache = LayerCache(RocketKVConfig(token_budget=256, eviction=policy, selection=method))
    assert cache.eviction is policy
    assert cache.selection is method


def test_the_package_exports_what_it_says() -> None:
    assert sorted(rocketkv.__all__) == sorted(rocketkv._HOMES)
    for name in rocketkv.__all__:
        assert getattr(rocketkv, name).__name__ == name
    with pytest.raises(AttributeError):
        rocketkv.nothing  # noqa: B018  the access itself is the test


def test_plain_mistakes_in_a_configuration_are_told_in_a_sentence() -> None:
    for make, message in (
        (lambda: LayerCache(32), "32 is no RocketKVConfig; give RocketKVConfig"),
        (lambda: LayerCache(None), "None is no RocketKVConfig"),
        (lambda: LayerCache(RocketKVConfig(**SMALL), keep_queries=-1), "keep_queries=-1 is too small; give 0 or more"),
        (lambda: LayerCache(RocketKVConfig(**SMALL), keep_queries=1.5), "keep_queries=1.5 is not a whole number"),
        (
            lambda: RocketKVConfig(256),
            r"RocketKVConfig\(256\) does not name its options; write RocketKVConfig\(token_bu",
        ),
        (lambda: RocketKVConfig(budget=128), "token_budget is missing beside budget; give token_budget="),
        (lambda: RocketKVConfig(token_budget=256, budget=128), "budget=128 is no rocketkv.Budget; give one"),
        (lambda: RocketKVConfig(token_budget=256, eviction=SnapKV), "eviction=SnapKV is a class; give a name, or an"),
        (lambda: RocketKVConfig(token_budget=256, selection=LowBit), "selection=LowBit is a class; give a name, or an"),
        (lambda: RocketKVConfig(token_budget=256, archive_on_host="no"), "archive_on_host='no' is not a truth value"),
        (lambda: RocketKVConfig(token_budget=torch.tensor(256)), "is not a whole number; give 1 or more"),
        (lambda: split_budget(1000.5, 64, 64), "seq_len=1000.5 is not a whole number; give 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    config = RocketKVConfig(
        token_budget=np.int64(256), recent_tokens=np.int32(4), budget=Budget(*np.array([9, 1, 2, 8]))
    )
    assert config == RocketKVConfig(token_budget=256, recent_tokens=4, budget=Budget(9, 1, 2, 8))
    assert type(config.token_budget) is type(config.recent_tokens) is type(config.budget.top_k) is int
    assert split_budget(np.int64(1000), np.int64(64), np.int64(64)) == split_budget(1000, 64, 64)
