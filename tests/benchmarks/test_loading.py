import pytest

from japanese_stable_diffusion.benchmarks import loading


def test_reading_counts_every_byte(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(9 * 2**20))
    (tmp_path / "c").write_bytes(b"12345")
    loading.forget_files(tmp_path)
    assert loading.read_files(tmp_path).bytes == 9 * 2**20 + 5


@pytest.mark.slow
def test_setup_is_measured_in_a_process_of_its_own(tiny_weights, weights) -> None:
    measured = loading.load(tiny_weights)
    models = (weights.text_encoder, weights.unet, weights.vae)
    assert measured.weights_bytes == sum(t.nbytes for model in models for t in model.state_dict().values())
    assert 0 < measured.seconds <= measured.seconds_used
    assert measured.peak_bytes > 0
