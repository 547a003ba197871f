"""The recipes and the tables made of them: complete, consistent, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mrcn_fast.reid.paper.recipes import load_recipe, load_table, recipe_names, table_names
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

BASES = {"paper", "sysu-mm01", "regdb", "llcm", "synthetic"}

# What makes a row a row; a scale laid over it must leave it alone.
ROW_VALUES = {"dataset", "model", "stages", "gate", "parts", "cqc_weight"}


def config_of(recipe: str) -> TrainConfig:
    return TrainConfig(**(load_recipe(recipe) | {"data": "tree"}))


def test_the_papers_values_are_the_defaults() -> None:
    values = load_recipe("paper")
    defaults = TrainConfig(data="").as_dict()
    assert values == {name: defaults[name] for name in values}
    # Everything that decides what is computed is written down there or in a data set's recipe.
    free = {
        "data", "out", "dataset", "split", "stages", "cache", "skip_unreadable", "weights", "init", "batches",
        "steps", "seed", "backend", "accelerator", "speed", "precision", "channels_last", "compile",
        "devices", "nodes", "gather", "sync_batchnorm", "workers", "log_every", "checkpoint_every", "logger",
        "validate_every", "validate_on",
    }  # fmt: skip
    assert {field.name for field in fields(TrainConfig)} - set(values) == free


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"synthetic"}))
def test_every_recipe_is_a_configuration(name: str) -> None:
    config = config_of(name)
    for dataset in ("sysu-mm01", "regdb", "llcm"):
        if name.startswith(dataset):
            assert config.dataset == dataset


def test_every_row_of_every_table_has_its_recipe() -> None:
    used = set()
    for table in table_names():
        spec = load_table(table)
        datasets = {column.dataset for column in spec.columns.values()}
        for row in spec.rows:
            assert set(row.paper) <= set(spec.columns), row
            for key, published in row.paper.items():
                assert len(published) == len(spec.columns[key].scores), row
            if row.recipes:
                assert set(row.recipes) == datasets, row
                for dataset, recipe in row.recipes.items():
                    assert config_of(recipe).dataset == dataset
                    used.add(recipe)
            else:
                assert row.paper, row
    detached = {f"{data}-mrcn-mean-detached" for data in ("regdb", "sysu-mm01", "llcm")}
    llcm = {"llcm-mrcn", "llcm-baseline", "llcm-mrcn-pooled-sum"}
    assert set(recipe_names()) - used == BASES | detached | llcm


def test_one_recipe_has_one_published_figure() -> None:
    seen: dict[tuple[str, str, str], float | None] = {}
    for table in table_names():
        spec = load_table(table)
        for row in spec.rows:
            for key, published in row.paper.items():
                column = spec.columns[key]
                for score, value in zip(column.scores, published, strict=True):
                    if row.recipes:
                        place = (row.recipes[column.dataset], column.search, score)
                        assert seen.setdefault(place, value) == value, place


def test_rows_differ_only_in_what_their_table_compares() -> None:
    def configs(table: str, dataset: str) -> dict[str, TrainConfig]:
        rows = load_table(table).rows
        return {row.title: config_of(row.recipes[dataset]) for row in rows if row.recipes}

    for dataset, stage in (("regdb", 1), ("sysu-mm01", 0)):
        components = configs("2", dataset)
        assert {title: (c.model, c.cqc_weight, c.stages) for title, c in components.items()} == {
            "baseline": ("baseline", 1.2, (stage,)),
            "MRCN (w/o CQC)": ("mrcn", 0.0, (stage,)),
            "MCM (w CQC)": ("mcm", 1.2, (stage,)),
            "MRM (w CQC)": ("mrm", 1.2, (stage,)),
            "MRCN": ("mrcn", 1.2, (stage,)),
        }
        assert [c.stages for c in configs("3", dataset).values()] == [(0,), (1,), (2,), (3,), (4,)]
        assert [c.model for c in configs("4", dataset).values()] == ["baseline", "snr", "mrcn"]
        assert [c.parts for c in configs("1", dataset).values()] == [1, 4]
        weights = {title: c.cqc_weight for title, c in configs("figure4", dataset).items()}
        assert weights == {title: float(title) for title in weights}
        assert min(weights.values()) == 0 and max(weights.values()) == 2
    assert [c.gate for c in configs("attention", "regdb").values()] == ["cbam", "eca", "se"]


def test_the_synthetic_scale_leaves_the_rows_alone() -> None:
    assert not ROW_VALUES & set(load_recipe("synthetic"))


def test_a_recipe_extends_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: regdb-mrcn\nepochs: 3\nlr: 0.5\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nlr: 0.25\n")
    config = config_of(str(tmp_path / "own.yaml"))
    assert (config.dataset, config.stages, config.epochs, config.lr) == ("regdb", (1,), 3, 0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"got recipe '.*odd\.yaml', expected the path of a .yaml file or one of .*regdb-mrcn"),
        ("colour: red\nshape: round\n", "unknown values: colour, shape"),
        ("- 1\n", "expected values of TrainConfig by name; found a list"),
        ("a: [\n", "this is no YAML"),
        ("extends: nowhere\n", r"odd\.yaml: got extends='nowhere'"),
        ("extends: 7\n", r"odd\.yaml: got extends=7, expected the path of a \.yaml file or one of"),
        ("extends: [a, b]\n", r"odd\.yaml: got extends=\['a', 'b'\]"),
        ("height: 48.5\n", r"odd\.yaml: got height=48\.5, expected an integer from 32 to 8192"),
        ("lr: abc\n", r"odd\.yaml: got lr='abc', expected a number of at least 0"),
        ("lr: .nan\n", r"odd\.yaml: got lr=nan, expected a finite number"),
        ("flip: true\n", r"odd\.yaml: got flip=True, expected a number from 0 to 1"),
        ('epochs: "3"\n', r"odd\.yaml: got epochs='3', expected an integer"),
        ("stages: 0\n", r"odd\.yaml: got stages=0, expected a list of values, each an integer from 0 to 4"),
        ("stages: [0, 7]\n", r"odd\.yaml: got stages\[1\]=7"),
        ("milestones: &a [*a]\n", r"odd\.yaml: got milestones\[0\]=\[.*, expected an integer"),
        ("depth: 34\n", r"odd\.yaml: got depth=34, expected one of 18, 50"),
        ("channels_last: yes\n", r"odd\.yaml: got channels_last='yes', expected true or false"),
        ("seed: 18446744073709551616\n", r"odd\.yaml: got seed=18446744073709551616, expected an integer"),
        ("warmup_epoch: 3\n", r"odd\.yaml: unknown values: warmup_epoch; did you mean warmup_epochs\?"),
        ("7: 8\n", r"odd\.yaml: unknown values: 7"),
    ],
)
def test_unfit_recipes_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_a_long_chain_of_recipes_is_refused(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match="expected at most 16 recipes that extend one another"):
        load_recipe(str(tmp_path / "0.yaml"))


def test_a_tilde_in_a_recipe_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "base.yaml").write_text("data: ~/sets\nlr: 1e-3\n")
    (tmp_path / "own.yaml").write_text("extends: ~/base.yaml\ncache: ~\n")
    config = TrainConfig(**load_recipe(str(tmp_path / "own.yaml")))
    assert (config.data, config.lr, config.cache) == (str(tmp_path / "home" / "sets"), 1e-3, None)


@pytest.mark.parametrize("names", [["own"], ["own", "base"], ["own", "base", "root"]])
def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path, names: list[str]) -> None:
    # Through the folder's own name the path to a file grows each time.
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        (tmp_path / f"{name}.yaml").write_text(f"extends: ../{tmp_path.name}/{base}.yaml\n")
    chain = " -> ".join(str(tmp_path / f"{name}.yaml") for name in [*names, names[0]])
    with pytest.raises(ConfigError, match=f"must not extend itself; found {re.escape(chain)}$"):
        load_recipe(str(tmp_path / "own.yaml"))


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="'5', expected one of 1, 2, 3, 4, attention, cqc, figure4"):
        load_table("5")
