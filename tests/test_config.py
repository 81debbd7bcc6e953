import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import rocketkv
from rocketkv import Budget, ConfigError, LayerCache, RocketKVConfig
from rocketkv.eviction import KeepAll
from rocketkv.selection import Exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"token_budget": 16},
            "token_budget=16 is smaller than window_size=32; raise token_budget or lower window_size.",
        ),
        ({"token_budget": 0}, "token_budget=0 is too small; give 1 or more."),
        ({"token_budget": 2.5}, "token_budget=2.5 is not a whole number; give 1 or more."),
        ({"token_budget": True}, "token_budget=True is not a whole number; give 1 or more."),
        ({"token_budget": 256, "mode": "multi"}, "mode='multi' does not exist; did you mean multi_turn?"),
        (
            {"token_budget": 256, "archive_on_host": True},
            "archive_on_host=True needs an archive; set mode='multi_turn' or leave it out.",
        ),
        ({"token_budget": 256, "eviction": "snap"}, "eviction='snap' does not exist; did you mean snapkv?"),
        (
            {"token_budget": 256, "selection": "zzz"},
            "selection='zzz' does not exist; choose from dense, exact, quest, sparq, hybrid, hybrid_paper, lowbit.",
        ),
        (
            {"token_budget": 256, "kernel_size": 64},
            "kernel_size=64 is even; a pooling window has a centre, so give an odd one.",
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
            "budget=(9, 1, 1, 9) is no rocketkv.Budget; make one, or leave it to the formulas.",
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
    with pytest.raises(ConfigError, match="lacks held_tokens, split, build_index, logits, scored_bytes; give a name"):
        RocketKVConfig(token_budget=256, selection=object())


def test_unknown_options_are_type_errors_too() -> None:
    with pytest.raises(TypeError):
        RocketKVConfig(token_budget=256, topk=3)


def test_is_frozen_and_keyword_only_and_copies() -> None:
    config = RocketKVConfig(token_budget=256)
    with pytest.raises(FrozenInstanceError):
        config.token_budget = 3
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
