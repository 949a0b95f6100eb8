"""The bundled demo model is what its script makes (test_streams.py has the stream)."""

from examples.demo import make_model


def test_the_model_and_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # the script sets it; this gives it back
    make_model.main(tmp_path)
    bundled = make_model.DEMO / "model"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in bundled.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (bundled / path.name).read_bytes(), path.name


def test_the_tokenizer_is_trained_on_whole_prompts():
    prompts = make_model.demo_prompts()
    assert len(prompts) == 36
    assert all("Example 1\nInput:\n```\n1: " in prompt and prompt.endswith("Output:\n") for prompt in prompts)
