"""What holds for every search space: its keys exist, its samples validate, its stages are true."""

from __future__ import annotations

import random

import pytest

from pipelines.chain.keys import config_slice
from pipelines.search.sampler import propose
from pipelines.search.space import (
    distributions,
    first_stage,
    load_space,
    overrides_of,
    searched_space,
    space_names,
)
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings, with_overrides
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from tests.pipelines.search_bench import PARETO
from tests.root import ROOT
from tune_spaces.domains import Choice, Domain, Integer, LogUniform, Uniform, Value

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SAMPLES = 25


@pytest.fixture(scope="module", params=CONFIGS, ids=[path.stem for path in CONFIGS])
def settings(request: pytest.FixtureRequest) -> Settings:
    of_one_rate = ["stage2.rate_weights=[]", "evaluate.rate_weights=[]", "evaluate.baselines=[]"]
    without_exits = ["model.exit_heads=false", "evaluate.early_exit={}"]
    return load_settings(request.param, [*of_one_rate, *without_exits, "model.requests=both"])


def ends(domain: Domain) -> tuple[Value, ...]:
    """The values at a domain's ends, or all of them."""
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


@pytest.mark.parametrize("name", space_names())
class TestEverySpace:
    def test_every_end_of_every_domain_is_a_valid_config(
        self, name: str, settings: Settings
    ) -> None:
        for key, field in load_space(name, include_stage1=True).items():
            for value in ends(field.domain):
                changed = with_overrides(settings, overrides_of({key: value}))
                read = changed.model_dump(mode="json")
                for part in key.split("."):
                    read = read[part]
                assert read == value

    def test_every_sample_is_a_valid_config(self, name: str, settings: Settings) -> None:
        space = load_space(name, include_stage1=True)
        for number in range(SAMPLES):
            sample = propose(
                space, (), number, kind="random", objective=PARETO, seed=0, startup_trials=1
            )
            assert set(sample) == set(space)
            with_overrides(settings, overrides_of(sample))

    def test_a_field_touches_the_stage_it_names(self, name: str, settings: Settings) -> None:
        for key, field in load_space(name, include_stage1=True).items():
            one, other = (
                with_overrides(settings, overrides_of({key: value}))
                for value in ends(field.domain)[:2]
            )
            again = config_slice(one, STAGES["stage1"]) != config_slice(other, STAGES["stage1"])
            assert again == (field.touches == "stage1"), key
            assert (
                config_slice(one, STAGES["stage2"]) != config_slice(other, STAGES["stage2"])
                or again
            ), key

    def test_prepared_data_and_teacher_are_shared_by_all_trials(
        self, name: str, settings: Settings
    ) -> None:
        for key, field in load_space(name, include_stage1=True).items():
            changed = with_overrides(settings, overrides_of({key: ends(field.domain)[0]}))
            for kind in ("prepare", "teacher"):
                assert config_slice(changed, STAGES[kind]) == config_slice(settings, STAGES[kind])

    def test_a_field_of_stage_1_has_three_values_at_most(self, name: str) -> None:
        for field in load_space(name, include_stage1=True).values():
            if field.touches == "stage1":
                assert isinstance(field.domain, Choice)
                assert len(field.domain.values) <= 3

    def test_bounds_are_in_order(self, name: str) -> None:
        for field in load_space(name, include_stage1=True).values():
            if not isinstance(field.domain, Choice):
                assert field.domain.low < field.domain.high

    def test_optuna_takes_every_domain(self, name: str) -> None:
        space = load_space(name, include_stage1=True)
        for key, distribution in distributions(space).items():
            for value in ends(space[key].domain):
                assert distribution.to_external_repr(distribution.to_internal_repr(value)) == value


def test_film_keeps_stage_1_as_it_is_unless_asked() -> None:
    assert first_stage(load_space("film", include_stage1=False)) == "stage2"
    assert "model.encoder.latent_channels" not in load_space("film", include_stage1=False)
    assert "model.encoder.latent_channels" in load_space("film", include_stage1=True)
    assert first_stage(load_space("joint", include_stage1=False)) == "stage1"


def test_an_unknown_space_is_refused_with_the_near_one() -> None:
    with pytest.raises(SettingsError, match="did you mean 'joint'"):
        load_space("joimt", include_stage1=False)


def test_every_kind_of_domain_stays_within_its_bounds() -> None:
    from tune_spaces.domains import Field

    space = {
        "a": Field(Uniform(-1.0, 2.0)),
        "b": Field(LogUniform(1e-3, 1e-1)),
        "c": Field(Integer(2, 64, log=True)),
        "d": Field(Integer(0, 3)),
        "e": Field(Choice((True, False))),
    }
    seed = random.Random(0).randrange(1000)
    for number in range(50):
        sample = propose(
            space, (), number, kind="random", objective=PARETO, seed=seed, startup_trials=1
        )
        assert -1.0 <= sample["a"] <= 2.0
        assert 1e-3 <= sample["b"] <= 1e-1
        assert sample["c"] in range(2, 65)
        assert sample["d"] in range(4)
        assert sample["e"] in (True, False)


def test_a_search_leaves_out_what_a_codec_that_is_asked_does_not_have() -> None:
    settings = load_settings(ROOT / "configs/scenes.yaml")
    space = searched_space(settings, "film", include_stage1=False)
    kinds = space["model.conditioning.kind"].domain
    assert isinstance(kinds, Choice)
    assert kinds.values == ("film", "none")
    detects = ["model.requests=both", "model.exit_heads=false", "evaluate.early_exit={}"]
    both = with_overrides(settings, detects)
    kinds = searched_space(both, "film", include_stage1=False)["model.conditioning.kind"].domain
    assert kinds == load_space("film", include_stage1=False)["model.conditioning.kind"].domain
    assert "stage2.rate_weight" not in searched_space(settings, "joint", include_stage1=False)
