"""The configuration: layers, overrides, and one line that helps for every mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaegan_dist.cli import main
from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml, load_config, preset_names, reference
from vaegan_dist.errors import ConfigError

MISTAKES = {
    # override: what the line must name, the remedy included
    "objective.bta=3": ("objective.bta=3", "unknown key", "'beta'"),
    "trainin.batch_size=3": ("trainin", "unknown key", "'training'"),
    "model.hiden=3": ("model.hiden=3", "unknown key", "'hidden'"),
    "phases.vae.imgs=3": ("imgs=3", "unknown key", "'images'"),
    "phases.vae.settings.betta=3": ("phases.vae.settings.betta=3", "unknown key", "'beta'"),
    "phases.vae.settings.beta=-3": ("phases.vae.settings.beta=-3", "greater than or equal to 0"),
    "phases.nope.images=3": ("phases.nope", "no such item", "vae"),
    "phases.vae.objective=vee": ("vee", "'vae', 'gan', 'vaegan' or 'introspective'"),
    "training.batch_size=many": ("training.batch_size=many", "integer"),
    "training.batch_size=0": ("training.batch_size=0", "greater than 0"),
    "optimizer.learning_rate=-1": ("optimizer.learning_rate=-1", "greater than 0"),
    "model.network=transformer": ("model.network=transformer", "choose one of", "mlp"),
    "data.streams=7": ("data.streams=7", "training.batch_size=128", "choose a divisor"),
    "cluster.workers=100": ("cluster.workers=100", "64 streams", "fewer workers"),
    "cluster.workers=3": ("cluster.workers=3", "does not divide", "divisor of 64"),
    "training.gradient_accumulation_steps=3": ("gradient_accumulation_steps=3", "128 images", "divisor"),
    "run.name=a/b": ("run.name=a/b", "pattern"),
    "objective=3": ("objective=3", "dictionary"),
    "nonsense": ("nonsense", "key=value"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_that_names_key_value_and_remedy(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    for part in MISTAKES[override]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["objective.bta=3", "data.streams=7", "--nope", "--nope=3"])
def test_the_command_line_reports_it_on_stderr_with_exit_code_2(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "smoke", "--dry-run", override]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and streams.err.count("\n") == 1 and not streams.out


def test_layers_lie_on_each_other(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("training: {batch_size: 32}\nobjective: {beta: 2}\n")
    second.write_text("objective: {beta: 3.5e-1}\n")
    config = load_config("smoke", [first, second], ["objective.beta=4", "run.name=x"])
    assert (config.training.batch_size, config.objective.beta, config.run.name) == (32, 4.0, "x")
    assert load_config("smoke", [first, second]).objective.beta == 0.35
    assert load_config("smoke").run.name == "smoke"


def test_phases_go_by_name_and_by_number() -> None:
    by_name = load_config("seed-mlp", overrides=["phases.joint.images=1000"])
    number = [phase.name for phase in by_name.phases].index("joint")
    assert by_name == load_config("seed-mlp", overrides=[f"phases.{number}.images=1000"])
    assert by_name.phases[number].images == 1000


@pytest.mark.parametrize("mistake", ["a: [1", "- 1", "{a: 1, b"])
def test_a_broken_file_is_named(tmp_path, mistake: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.yaml"
    path.write_text(mistake)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(files=[path])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(files=[tmp_path / "absent.yaml"])


@pytest.mark.parametrize("preset", preset_names())
def test_a_resolved_preset_reads_back_to_itself(preset: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(files=[path]) == config


def test_a_resolved_configuration_may_have_left_its_presets_network(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {network: conv, latent_dim: 4}\n")
    config = load_config("seed-mlp", [mine])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(config))
    assert load_config(files=[saved]) == config
    assert config.preset == "seed-mlp" and config.model.network == "conv"


def test_every_key_is_explained() -> None:
    for preset in preset_names():
        for key, kind, value, description in reference(load_config(preset)):
            assert kind and value, key
            assert len(description) > 10, f"{key} has no description"


@settings(deadline=None)  # the first example pays for imports
@given(batch=st.integers(1, 512), workers=st.integers(1, 64), streams=st.none() | st.integers(1, 64))
def test_an_accepted_configuration_gives_every_worker_the_same_share(
    batch: int, workers: int, streams: int | None
) -> None:
    overrides = [f"training.batch_size={batch}", f"cluster.workers={workers}", f"data.streams={streams or 'null'}"]
    try:
        config = load_config(overrides=overrides)
    except ConfigError:
        chosen = streams or max(s for s in range(1, 65) if batch % s == 0)
        assert batch % chosen or chosen % workers
        return
    assert batch % config.streams == 0 and config.streams % workers == 0


def test_the_tree_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]
