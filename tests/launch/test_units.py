"""From a sweep to units: command lines, names, and what is refused."""

import shlex
from pathlib import Path

import pytest

from flowgrpo_jax.errors import UserError
from launch import checks, hyper, units

ROOT = Path(__file__).parents[2]
GENEVAL = str(ROOT / "configs" / "geneval.py")


def test_command_lines_and_names():
    """Oracle: by hand; what does not differ is in no name, `config:` goes to --config."""
    points = hyper.product(
        [
            hyper.sweep("config:recipe", ["flow_grpo", "g2rpo"]),
            hyper.sweep("config.sample.sde_window_range", [(0, 5)]),
            hyper.sweep("config.seed", [1]),
        ]
    )
    made = units.make("a.py:model=sprites", points, ["--config.train.beta=0"])
    assert [unit.name for unit in made] == ["1-recipe=flow_grpo", "2-recipe=g2rpo"]
    assert made[1].words == (
        "--config=a.py:model=sprites,recipe=g2rpo",
        "--config.train.beta=0",
        "--config.sample.sde_window_range=(0, 5)",
        "--config.seed=1",
    )


def test_names_are_short_plain_and_apart():
    """Oracle: by hand; a shell reads nothing in them, and equal last parts stay whole."""
    points = [
        {"config.train.guidance_scale": 0.0, "config.eval.guidance_scale": s}
        for s in (1.0, "a b/c;$d")
    ] + [{"config.train.guidance_scale": 1.0, "config.eval.guidance_scale": "x" * 200}]
    names = [unit.name for unit in units.make("a.py", points)]
    assert names[1] == (
        "2-config.train.guidance_scale=0.0,config.eval.guidance_scale=a_b_c_d"
    )
    assert all(shlex.quote(name) == name or "=" in name for name in names)
    assert max(map(len, names)) < 110 and len(set(names)) == 3


REFUSED = [
    ([{"config.seed": 1}, {"config.seed": 1}], "units 1 and 2 are the same"),
    ([{"workdir": "x"}], "unit 1: workdir: x: the launcher gives every unit its own"),
    ([{"config.seed": None}], "unit 1: config.seed: None: must have a value"),
]


@pytest.mark.parametrize("points, line", REFUSED)
def test_units_that_cannot_be(points, line):
    """Oracle: the lines, by hand."""
    with pytest.raises(UserError, match=line):
        units.make("a.py", points)


FILES = {
    "def sweep(hyper):\n    return hyper.sweep('config.seed', [1, 2])": None,
    "def other(hyper):\n    return []": r"has no function sweep: give a Python file",
    "def sweep(hyper):\n    return []": "and at least one",
    "def sweep(hyper):\n    return 3": "gives 3: must be points",
    "def sweep(hyper):\n    return [3]": "must be points",
    "def sweep(hyper):\n    1 / 0": "ZeroDivisionError: division by zero: must be a Python file with sweep",
    "def sweep(hyper:": "SyntaxError",
}


@pytest.mark.parametrize("text, line", FILES.items())
def test_the_file_of_a_sweep(tmp_path, text, line):
    """Oracle: the lines, by hand; a file beside the config is the default."""
    file = tmp_path / "my sweep.py"
    file.write_text(text)
    if line is None:
        assert len(units.load(None, f"{file}:recipe=x")) == 2
        assert units.load(f"{file}:sweep", "other.py") == units.load(str(file), "x.py")
        return
    with pytest.raises(UserError, match=line):
        units.load(str(file), "x.py")


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    """Oracle: the line, by hand; a ready sweep is the package's own."""
    monkeypatch.chdir(tmp_path)
    assert len(units.load("launch/sweeps/seeds.py", "x.py")) == 3
    with pytest.raises(
        UserError, match="--sweep: no.py: no such file or directory: give"
    ):
        units.load("no.py", "x.py")


WRONG = [
    ({"config.train.bta": 1}, "unit 2: train.bta: unknown config key: did you mean"),
    ({"config.group_size": "a"}, "unit 2: group_size: a: must be a whole number"),
    ({"config.group_size": 1}, "unit 2: group_size: 1: must be at least 2"),
    ({"config.seed": 1, "confg": 1}, "unit 2: --confg: unknown flag: did you mean"),
    ({"config:recipe": "g2"}, "unit 2: recipe: g2: must be one of flow_grpo"),
    # Told only once the run is planned.
    ({"config.sample.num_steps": 3}, r"unit 2: sample.sde_window_range: \(1, 6\)"),
]


@pytest.mark.parametrize("point, line", WRONG)
def test_a_wrong_unit_is_told_by_its_number(point, line):
    """Oracle: the lines that `main` has for the same flags, by hand."""
    made = units.make(GENEVAL, [{"config.seed": 1}, point])
    with pytest.raises(UserError, match=f"^{line}"):
        checks.check(made)


def test_ready_sweeps_are_right():
    """Oracle: the checks of `main`; of every ready sweep and its first and last unit."""
    files = sorted((ROOT / "launch" / "sweeps").glob("*.py"))
    ready = [file for file in files if file.name not in ("__init__.py", "arena.py")]
    assert len(ready) >= 6
    for file in ready:
        made = units.make(GENEVAL, units.load(str(file), GENEVAL))
        assert len(checks.check([made[0], made[-1]])) == 2, file


def test_units_that_do_not_fit_are_named(monkeypatch):
    """Oracle: `estimate` for the same chips; units of one price are asked for once."""
    point = {"config.microbatch": 64, "config.remat": "none"}
    source = f"{GENEVAL}:model=sd3.5-medium"
    made = units.make(source, [{"config.seed": 1}, point | {"config.seed": 1}])
    made += units.make(source, [{}, point | {"config.seed": 2}])[1:]
    found = dict(enumerate((checks.config_of(unit.words) for unit in made), start=1))
    asked = []
    fit = checks.estimate.fit

    def counted(config, topology):
        asked.append(config.seed)
        return fit(config, topology)

    monkeypatch.setattr(checks.estimate, "fit", counted)
    refused = dict(checks.refused(found, "H100:8"))
    assert list(refused) == [2, 3] and asked == [1, 1]
    assert refused[2].startswith("does not fit by the formula: ")
