"""The library of experts, in a real registry and a real DVC cache; the experts are a few bytes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from poemerge.errors import PoemergeError, SettingError, SourceError
from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage, produce
from tasks import library
from tasks.dvc_store.reference import Reference, contents
from tasks.fetch import fetch
from tasks.library import Expert, check_tags
from tasks.versions import EXPERT, KIND, MERGE, SOURCES, claim

WORK = Path("work")


pytestmark = pytest.mark.usefixtures("registry")


def shelve(
    name: str,
    content: str,
    tags: Mapping[str, str] | None = None,
    score: float | None = None,
    *,
    base: str = "base",
    task: str = "",
) -> tuple[Expert, bool]:
    """Add an expert whose weights are that text; its folder is gone afterwards."""

    def work(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text(content)
        (folder / "adapter_config.json").write_text("{}")

    produce(WORK, Lineage("fetch", {}, uri=f"hf://org/{name}"), work)
    found = digest(hash_files(WORK))
    expert = Expert(name, task or name, found, base, digest(base), score, tags or {})
    try:
        return library.add(expert, WORK)
    finally:
        shutil.rmtree(WORK)


def refusal(action, *arguments: object, **settings: object) -> str:  # noqa: ANN001
    with pytest.raises(PoemergeError) as caught:
        action(*arguments, **settings)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_what_is_added_is_listed_as_it_was() -> None:
    added, new = shelve("red", "one", {"team": "nlp"}, 0.75, task="colours")
    assert new
    assert library.experts() == (added,)
    assert (added.uri, added.task, added.score) == ("models:/red/1", "colours", 0.75)
    assert added.as_json()["uri"] == "models:/red/1"


def test_the_same_bytes_are_the_same_version_and_others_a_new_one() -> None:
    shelve("red", "one", {"team": "nlp", "lang": "en"})
    again, new = shelve("red", "one", {"lang": "de"}, 0.5)
    assert (again.number, new) == ("1", False)
    (known,) = library.experts()
    assert (known.score, known.tags) == (0.5, {"team": "nlp", "lang": "de"})
    other, new = shelve("red", "two")
    assert (other.number, new) == ("2", True)
    (newest,) = library.experts()
    assert (newest.number, newest.score) == ("2", None)
    assert newest.tags == known.tags
    assert len(MlflowClient().search_model_versions("name = 'red'")) == 2


def test_its_bytes_are_in_dvc_with_what_made_them() -> None:
    expert, _ = shelve("red", "one")
    fetch.fn("red", expert.uri, "out")
    assert digest(hash_files(Path("out"))) == expert.digest
    record = Lineage.find(Path("out"))
    assert record is not None
    assert record.revision == f"models:/red/1@{expert.digest}"
    assert record.inputs[0].parent is not None
    assert record.inputs[0].parent["uri"] == "hf://org/red"


def test_selection_is_by_all_tags_of_the_newest_versions() -> None:
    shelve("red", "one", {"team": "nlp", "lang": "en"})
    shelve("amber", "two", {"team": "nlp", "lang": "de"}, task="red")
    shelve("blue", "three", {"team": "vision"})
    shelve("red", "four")

    def names(**wanted: str) -> list[str]:
        return [expert.uri for expert in library.select(wanted)]

    assert names(team="nlp") == ["models:/amber/1", "models:/red/2"]
    assert names(team="nlp", lang="en") == ["models:/red/2"]
    assert names(task="red") == ["models:/amber/1", "models:/red/2"]
    assert names(name="blue", team="vision") == ["models:/blue/1"]
    message = refusal(library.select, {"team": "nlp", "lang": "fr"})
    assert message.startswith("None of the 3 experts in the library has team=nlp, lang=fr;")


def test_the_same_bytes_for_another_base_or_task_are_refused() -> None:
    shelve("red", "one")
    assert "has the same bytes, as an expert for red on base" in refusal(
        shelve, "red", "one", base="another"
    )
    assert "give --name" in refusal(shelve, "red", "one", task="green")
    assert shelve("red2", "one", base="another")[1]


def test_merges_and_experts_do_not_share_a_name() -> None:
    client = MlflowClient()
    client.create_registered_model("merged")
    shelve("red", "one")
    assert "merged is the name of a registered merge" in refusal(shelve, "merged", "one")
    with pytest.raises(SourceError, match="red is the name of a registered expert"):
        claim(client, "red", MERGE)
    claim(client, "red", EXPERT)
    claim(client, "new", MERGE)
    assert client.get_registered_model("new").tags == {KIND: MERGE}
    assert [expert.name for expert in library.experts()] == ["red"]
    assert "has no expert merged" in refusal(library.remove, "merged", None, force=True)


def test_removing_leaves_the_bytes_in_dvc() -> None:
    shelve("red", "one")
    shelve("red", "two")
    first = MlflowClient().get_model_version("red", "1").source
    assert "has no version 7; it has 1, 2." in refusal(library.remove, "red", "7", force=False)
    assert library.remove("red", "1", force=False) == ["models:/red/1"]
    assert [expert.uri for expert in library.experts()] == ["models:/red/2"]
    assert library.remove("red", None, force=False) == ["models:/red/2"]
    assert library.experts() == ()
    assert "adapter_model.safetensors" in contents(Reference.parse(first)[0])


def test_what_a_merge_was_made_from_is_kept() -> None:
    (one, _), (other, _) = shelve("a_b", "one"), shelve("acb", "two")
    client = MlflowClient()
    claim(client, "merged", MERGE)
    sources = json.dumps({"base": "base@1", "a": f"{one.uri}@{one.digest}"})
    client.create_model_version("merged", "dvc://somewhere", tags={SOURCES: sources})
    message = refusal(library.remove, "a_b", None, force=False)
    assert message.startswith("models:/merged/1 was made from models:/a_b/1,")
    assert library.remove("acb", other.number, force=False) == ["models:/acb/1"]
    assert library.remove("a_b", "1", force=True) == ["models:/a_b/1"]


@pytest.mark.parametrize("key", ["task", "name", "poemerge.kind", "mlflow.user", "a b", "", "-x"])
def test_keys_that_can_be_no_tags(key: str) -> None:
    with pytest.raises(SettingError, match="can be no tag"):
        check_tags({"team": "nlp", key: "x"})
