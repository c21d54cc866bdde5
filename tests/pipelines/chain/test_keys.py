"""The part of a config that identifies a stage: fields at their first default are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, create_model

from mantis_core.architecture import ModelConfig
from pipelines.chain import keys
from pipelines.chain.keys import digest, slim_slice, without_defaults
from pipelines.settings.reading import load_settings, to_yaml
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from tests.root import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
WITH_MODEL = [path for path in CONFIGS if "\nmodel:" in path.read_text(encoding="utf-8")]
DEFAULTS = Path(__file__).with_name("defaults.json")


def settings(tmp_path: Path, text: str = "") -> Settings:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "data: {sources: [{kind: shapes}]}\ntasks: [{name: outline, classes_from: shapes}]\n" + text
    )
    return load_settings(path)


def test_a_field_at_its_default_is_left_out_whether_it_was_written_or_not(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    written = settings(tmp_path, f"model: {{prior: {plain.model.prior}}}\nstage1: {{epochs: 4}}\n")
    for stage in STAGES.values():
        assert slim_slice(plain, stage) == slim_slice(written, stage)
    assert slim_slice(settings(tmp_path, "model: {prior: shared}"), STAGES["stage2"]) == {
        "model": {"prior": "shared"}
    }


def test_a_section_is_measured_by_its_own_default(tmp_path: Path) -> None:
    """The teacher trains 12 epochs by default, every other training 4."""
    four = settings(tmp_path, "teacher: {training: {epochs: 4}}")
    assert without_defaults(four)["teacher"]["training"]["epochs"] == 4
    assert "teacher" not in without_defaults(settings(tmp_path))


def test_elements_of_lists_keep_their_kind(tmp_path: Path) -> None:
    found = without_defaults(settings(tmp_path))
    assert found["data"]["sources"] == [{"kind": "shapes"}]
    assert found["tasks"] == [
        {"kind": "classification", "name": "outline", "classes_from": "shapes"}
    ]


def test_a_loss_term_counts_by_what_differs(tmp_path: Path) -> None:
    found = settings(tmp_path, "stage1: {losses: {logits: {criterion: TeacherLogits}}}")
    assert slim_slice(found, STAGES["stage1"])["stage1"] == {
        "losses": {"logits": {"criterion": "TeacherLogits"}}
    }


@pytest.mark.parametrize("path", WITH_MODEL, ids=[path.stem for path in WITH_MODEL])
def test_a_new_field_with_a_default_changes_no_digest(path: Path) -> None:
    before = load_settings(path)
    larger = create_model(
        "Larger", __base__=ModelConfig, of_tomorrow=(int, 3), switch=(bool, False)
    )
    model = larger.model_validate_json(before.model.model_dump_json())
    after = before.model_copy(update={"model": model})
    for stage in STAGES.values():
        assert digest(slim_slice(after, stage)) == digest(slim_slice(before, stage))
    set_ = before.model_copy(update={"model": model.model_copy(update={"of_tomorrow": 4})})
    assert slim_slice(set_, STAGES["stage2"]) != slim_slice(before, STAGES["stage2"])


def test_a_changed_default_changes_the_digests_of_those_who_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(keys.FIRST_DEFAULTS, "model.prior", "shared")
    usual, first = settings(tmp_path), settings(tmp_path, "model: {prior: shared}")
    assert slim_slice(usual, STAGES["stage2"]) == {"model": {"prior": usual.model.prior}}
    assert slim_slice(first, STAGES["stage2"]) == {}


def defaults(model: type[BaseModel], place: str = "") -> dict[str, Any]:
    """The default of every field of the config, by dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        where = f"{place}.{name}".lstrip(".")
        value = field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            found |= {f"{where}.{k}": v for k, v in plain(value).items()}
        elif not field.is_required():
            found[where] = json.loads(json.dumps(value, default=lambda each: each.model_dump()))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and field.is_required():
            found |= defaults(kind, where)
    return found


def plain(value: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in value:
        if isinstance(each, BaseModel):
            found |= {f"{name}.{k}": v for k, v in plain(each).items()}
        else:
            found[name] = json.loads(json.dumps(each, default=lambda item: item.model_dump()))
    return found


def test_no_default_changes_without_a_note_for_the_digests() -> None:
    """If this fails for a field whose default changed: note the first one in FIRST_DEFAULTS.

    Then write the new defaults down: python -m tests.pipelines.chain.test_keys.
    """
    known, found = json.loads(DEFAULTS.read_text()), defaults(Settings)
    changed = {name for name in known.keys() & found.keys() if known[name] != found[name]}
    assert changed <= keys.FIRST_DEFAULTS.keys()
    assert found.keys() <= known.keys(), "a new field: write its default down"


def test_a_resolved_config_has_the_digests_of_its_file(tmp_path: Path) -> None:
    for path in CONFIGS:
        (tmp_path / "resolved.yaml").write_text(to_yaml(load_settings(path)))
        again = load_settings(tmp_path / "resolved.yaml")
        for stage in STAGES.values():
            assert slim_slice(again, stage) == slim_slice(load_settings(path), stage)


if __name__ == "__main__":
    DEFAULTS.write_text(json.dumps(defaults(Settings), indent=2, sort_keys=True) + "\n")
