"""One entry is all that a setting takes."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qwen_jax import settings as module
from qwen_jax.cli import FlagParser
from qwen_jax.settings import BYTES, HOW, Settings, _setting, add_settings, recalled, recorded, take_settings


def parsed(*flags: str) -> Settings:
    parser = FlagParser(env_for_all=True)
    add_settings(parser)
    return take_settings(vars(parser.parse_args(["--worker_id", "3", *flags])))


@pytest.fixture
def with_one_more(monkeypatch):
    """The settings, and another one."""

    @dataclass(frozen=True, kw_only=True)
    class More(Settings):
        favourite_colours: tuple[str, ...] = _setting(
            ("red",), "colours", choices=lambda: ("red", "green"), many=True, recorded=BYTES
        )

    entries = {each.name: each.metadata["entry"] for each in More.__dataclass_fields__.values()}
    monkeypatch.setattr(module, "Settings", More)
    monkeypatch.setattr(module, "ENTRIES", entries)


def test_a_new_setting_is_a_flag_a_variable_recorded_and_passed_on(with_one_more, monkeypatch, capsys):
    assert parsed().favourite_colours == ("red",)
    assert parsed("--favourite_colours", "green", "red").favourite_colours == ("green", "red")
    monkeypatch.setenv("FAVOURITE_COLOURS", "red green")
    settings = parsed()
    assert settings.favourite_colours == ("red", "green")
    stored = recorded(settings, BYTES)
    assert stored["favourite_colours"] == "red green"
    assert recalled(stored, BYTES)["favourite_colours"] == ("red", "green")
    assert "FAVOURITE_COLOURS" in module.variables(local=False)
    monkeypatch.setenv("FAVOURITE_COLOURS", "blue")
    with pytest.raises(SystemExit):
        parsed()
    assert "FAVOURITE_COLOURS" in capsys.readouterr().err


@pytest.fixture
def no_variables(monkeypatch):
    monkeypatch.delenv("PROGRESS_INTERVAL_S")


@pytest.mark.usefixtures("no_variables")
def test_what_is_recorded_makes_the_same_settings_again():
    settings = replace(
        parsed("--keep_tokens", "last:3", "--activation_type", "mlp", "attn"), layers_to_extract=(0, 2)
    )
    again = Settings(
        worker_id=3, **recalled(recorded(settings, BYTES), BYTES), **recalled(recorded(settings, HOW), HOW)
    )
    assert again == settings


@pytest.mark.usefixtures("no_variables")
def test_defaults_are_read_as_words_are():
    """Also where no parser is: a folder is a Path, ~ is the home."""
    plain = Settings(worker_id=3)
    assert plain == parsed()
    assert plain.dataset_dir == Path("./data/streams")
    assert "~" not in str(plain.compilation_cache_dir)
    assert plain.stream_path.name == "stream_003.jsonl" and plain.worker_dir.name == "worker_3"
