"""Every bad setting ends in one sentence, from TOML and from the shell; 500 fuzzed configs never end in a traceback."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tppo_fast import config as settings
from tppo_fast.errors import UserError
from tppo_fast.experiment_config import Experiment
from tppo_fast.overrides import merge
from tppo_fast.sections import build_section, first_change, given


def sentence(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        settings.build(merge(values, list(overrides)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_valid_and_frozen() -> None:
    config = settings.build({})
    assert config.ppo.gamma == 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.ppo.gamma = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ppo": {"learning_rat": 1e-5}}, "unknown setting 'ppo.learning_rat'"),
        ({"run_dirr": "x"}, "did you mean 'run_dir'?"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p = 0.9"),
        ({"algorithm": "grop"}, "algorithm = 'grop'"),
    ],
)
def test_python_says_it_in_the_same_sentence(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.Config(**values)
    assert expected in str(caught.value)
    assert str(caught.value) == sentence(values)


def test_a_config_is_copied_as_any_model_of_pydantic() -> None:
    config = settings.Config(ppo=settings.PPOConfig(lr=1e-3), seed=3)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert settings.Config.model_validate(config.model_dump()) == config
    assert settings.Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(UserError, match=r"^lr = '1': write a number"):
        settings.PPOConfig(lr="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["--ppo.lr", "1e-6"], "ppo.lr", 1e-6),
        (["--ppo.lr=1e-6"], "ppo.lr", 1e-6),
        (["--ppo.whiten-advantages", "false"], "ppo.whiten_advantages", False),
        (["--ppo.no-whiten_advantages"], "ppo.whiten_advantages", False),
        (["--model.shared_body"], "model.shared_body", True),
        (["--ppo.target_kl", "none"], "ppo.target_kl", None),
        (["--run_dir", "runs/x y"], "run_dir", Path("runs/x y")),
        (["--data.separator", "; "], "data.separator", "; "),
        (["--ppo.lr", "1e-3", "--ppo.lr", "1e-4"], "ppo.lr", 1e-4),
        (["--reward.coefficient", "-2"], "reward.coefficient", -2.0),
    ],
    ids=str,
)
def test_overrides(overrides: list[str], field: str, value: Any) -> None:
    found: Any = settings.build(merge({"ppo": {"lr": 0.5}}, overrides))
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--run_dir", "2026-11-27"], "run_dir", Path("2026-11-27")),
        (["--run-dir=20261127"], "run_dir", Path("20261127")),
        (["--data.train", "07:17:12"], "data.train", "07:17:12"),
        (["--data.eval", "1_000"], "data.eval", "1_000"),
        (["--data.eval", "none"], "data.eval", None),
        (["--data.separator", '" | "'], "data.separator", " | "),
        (["--seed", "1_000"], "seed", 1000),
        (["--model.lora_targets", '["q_proj"]', "--model.lora_rank", "4"], "model.lora_targets", ("q_proj",)),
    ],
    ids=str,
)
def test_a_word_of_the_shell_stays_a_word_where_a_text_is_asked_for(
    tmp_path: Path, words: list[str], field: str, value: Any
) -> None:
    (tmp_path / "c.toml").touch()
    found: Any = settings.load(tmp_path / "c.toml", words)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


def test_paths_are_objects_or_texts_and_know_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-u")
    written = {
        "run_dir": "~/r", "model": {"path": Path("~/m")}, "reward": {"source": "model", "model": Path("m")},
        "data": {"train": Path("t.jsonl"), "eval": "~/e.jsonl", "separator": "~"},
    }  # fmt: skip
    config = settings.build(written)
    assert (config.run_dir, config.model.path, config.reward.model) == (Path("/home-of-u/r"), "/home-of-u/m", "m")
    assert (config.data.train, config.data.eval, config.data.separator) == ("t.jsonl", "/home-of-u/e.jsonl", "~")
    assert settings.Config(run_dir=Path("~/r")).run_dir == Path("/home-of-u/r")
    assert "run_dir = 3: give a path" in sentence({"run_dir": 3})


def test_a_config_is_given_as_itself_as_a_dict_or_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[ppo]\nlr = 1e-3\ndual_clip = 'none'")
    config = settings.Config(ppo=settings.PPOConfig(lr=1e-3))
    for way in (config, {"ppo": {"lr": 1e-3}}, tmp_path / "c.toml", str(tmp_path / "c.toml")):
        assert given(way, settings.Config) == config
    with pytest.raises(UserError, match="config = 3: give a Config"):
        given(3, settings.Config)  # type: ignore[arg-type]


def test_a_setting_that_takes_a_path_is_no_switch(tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    with pytest.raises(UserError, match="run_dir = True: give a path, in quotes"):
        settings.load(tmp_path / "c.toml", ["--run_dir"])


@pytest.mark.parametrize(
    ("values", "overrides", "expected"),
    [
        ({"ppo": {"learning_rat": 1}}, (), "unknown setting 'ppo.learning_rat'"),
        ({"ppo": {"clip_hihg": 0.2}}, (), "did you mean 'ppo.clip_high'?"),
        ({"pppo": {}}, (), "did you mean 'ppo'?"),
        ({"lr": 1e-3}, (), "did you mean 'ppo.lr'?"),
        ({}, ("--ppo.lr", "fast"), "ppo.lr = 'fast'"),
        ({}, ("--ppo.clip_low", "1.5"), "ppo.clip_low = 1.5: input should be less than 1"),
        ({}, ("--ppo.epochs", "1000000000"), "ppo.epochs = 1000000000: input should be less than or equal to 1000"),
        ({}, ("--ppo.minibatches", "1000000"), "ppo.minibatches = 1000000: input should be less than or equal to 100000"),
        ({}, ("--ppo.lr", "nan"), "ppo.lr = nan"),
        ({}, ("--ppo.kl_placement", "sideways"), "'reward', 'loss' or 'off'"),
        ({}, ("--rollout.top_p", "0.9"), "rollout.top_p = 0.9"),
        ({}, ("--rollout.top_k", "50"), "biased"),
        ({}, ("--data.template", "no place"), "{history}"),
        ({}, ("--reward.source", ":f"), "module:function"),
        ({}, ("ppo.lr", "1"), "--section.key value"),
        ({"ppo": 3}, ("--ppo.lr", "1"), "'ppo' is a value, not a section"),
        ({"ppo": 3}, (), "ppo = 3: this is a section; set one of its fields"),
        ({}, ("--ppo.lr",), "ppo.lr = True: give it a number"),
        ({"ppo": {"lr": "1e-4"}}, (), "ppo.lr = '1e-4': write a number, without quotes"),
        ({"seed": True}, (), "seed = True: give it a number"),
        ({"model": {"shared_body": "yes"}}, (), "model.shared_body = 'yes': write true or false"),
        ({"model": {"shared_body": 1}}, (), "model.shared_body = 1: write true or false"),
        ({"model": {"lora_targets": "q_proj"}}, (), 'model.lora_targets = \'q_proj\': write a list: ["a", "b"]'),
        ({"run_dir": ""}, (), "run_dir = '': give a path"),
        ({"nope": 1}, (), "unknown setting 'nope': there are run_dir, seed"),
        ({"run_dir": 3}, (), "run_dir = 3: give a path, in quotes"),
        ({"threads": 100_000_000}, (), "threads = 100000000"),
        ({"zzz": 1}, (), "unknown setting 'zzz': there are run_dir, seed"),
        ({}, ("--ppo.kl_target", "1", "--ppo.kl_placement", "off"), "has no effect"),
        ({"model": {"lora_targets": ["q_proj"]}}, (), "has no effect with model.lora_rank = 0"),
        ({"reward": {"model": "m"}}, (), "reward.model = 'm' has no effect with reward.source = \"lexical\""),
        ({"reward": {"value": "soft"}}, (), "reward.value = \"soft\" has no effect with reward.source = \"lexical\""),
        ({}, ("--ppo.kl_estimator", "k1", "--ppo.kl_placement", "loss"), "use k2 or k3"),
    ],
)  # fmt: skip
def test_bad_settings(values: dict[str, Any], overrides: tuple[str, ...], expected: str) -> None:
    assert expected in sentence(values, *overrides)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a = [", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a = 1\na = 2", "not valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        settings.load(path)


def test_a_forgotten_file_and_a_forgotten_setting_are_said() -> None:
    with pytest.raises(UserError, match=r"^config is missing: .* first, then settings such as --ppo\.lr$"):
        settings.load("--ppo.lr", ["1e-4"])
    with pytest.raises(UserError, match=r"^methods is missing: it has no default$"):
        build_section({}, Experiment)


def test_every_setting_has_a_sentence() -> None:
    def check(section: type[settings.Section]) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.default, settings.Section):
                check(type(field.default))
            else:
                assert field.description, f"{section.__name__}.{name}"
                assert field.description.strip().endswith((".", ")")), f"{section.__name__}.{name}"

    check(settings.Config)


def test_config_and_help_load_without_torch() -> None:
    code = (
        "import sys, tppo_fast.cli, tppo_fast.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _mutated(rng: random.Random, text: str) -> bytes:
    """A config with something wrong, or not."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(7)
        at = rng.randrange(len(lines))
        if kind == 0:
            lines.insert(
                at, rng.choice(["nonsense", "= 3", "[", "[ppo", "x = ", "\x00", '"""', "a.b.c = 1", "[[ppo]]"])
            )
        elif kind == 1:
            lines[at] = lines[at].replace(
                "=", rng.choice(["", "==", ":", "= -", "= 'x'", "= []", "= {}", "= nan", "= 1e999"]), 1
            )
        elif kind == 2:
            del lines[at]
            lines = lines or [""]
        elif kind == 3:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif kind == 4:
            lines.append(lines[at])
        elif kind == 5:
            lines[at] = "".join(rng.sample(lines[at], len(lines[at])))
        else:
            lines[at] = lines[at].split("=")[0] + "= " + rng.choice(
                ["-1", "0", "1e30", "true", "'inf'", "99999999999999999999", "1979-05-27", "[1, 2]",
                 "'\\u0000'", "'../../etc'", "''"]
            )  # fmt: skip
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    return raw if rng.random() < 0.95 else raw[: len(raw) // 2] + rng.randbytes(3) + raw[len(raw) // 2 :]


def full_config() -> str:
    """Every setting at its default, as TOML."""
    lines: list[str] = []
    tables: list[str] = []
    for name, value in settings.build({}).model_dump(mode="json").items():
        if isinstance(value, dict):
            tables += [f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None)]
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, *tables])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value) if isinstance(value, int | float) else '"' + value.replace("\n", "\\n") + '"'


def test_full_config_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(full_config())
    assert settings.load(path) == settings.build({})


def test_500_fuzzed_configs_end_in_a_config_or_one_sentence(tmp_path: Path) -> None:
    text, path, good = full_config(), tmp_path / "c.toml", 0
    sentences: list[str] = []
    for seed in range(500):
        rng = random.Random(seed)
        path.write_bytes(_mutated(rng, text))
        words = rng.choices(
            ["--ppo.lr", "1e-6", "--", "-x", "--=", "--a.b", "--ppo", "none", "--ppo.lr=", "--no-x", "--.", "é"],
            k=rng.randrange(4),
        )
        try:
            settings.load(path, words)
            good += 1
        except UserError as error:
            sentences.append(str(error))
    assert all("\n" not in s and 10 < len(s) < 1000 for s in sentences)
    assert 5 < good < 490


def test_the_first_change_is_named_but_for_what_is_free() -> None:
    saved = {"seed": 0, "ppo": {"lr": 1e-5, "gone": None}, "train": {"steps": 1}}
    now = {"seed": 0, "ppo": {"lr": 1e-6}, "train": {"steps": 2}, "threads": 1}
    assert first_change(saved, now) == ("ppo.lr", 1e-5, 1e-6)
    assert first_change(saved, now, {"ppo.lr", "train"}) == ("threads", None, 1)
    assert first_change(saved, now, {"ppo", "train", "threads"}) is None
