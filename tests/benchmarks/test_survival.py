from PIL import Image

from japanese_stable_diffusion.benchmarks import survival


def test_every_photograph_is_another_piece_of_at_least_forty() -> None:
    pictures = list(survival.photographs())
    assert len(pictures) >= 40
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert {picture.size for picture in pictures} == {(256, 256)}


def test_rates_are_those_of_the_mark() -> None:
    picture = next(survival.photographs())
    measured = survival.measure_survival([picture, picture.transpose(Image.Transpose.ROTATE_90)])
    assert measured.pictures == 2
    assert measured.found["JPEG 75"] == measured.whole["PNG"] == 1
    assert 42 < measured.psnr[1] <= measured.psnr[0] < 46


def test_marked_pictures_raise_alarms_and_others_do_not(monkeypatch) -> None:
    pictures = [next(survival.photographs())]
    alarms, highest = survival.count_false_alarms(pictures, 8)
    assert alarms == 0 and highest < survival.watermark.THRESHOLD
    monkeypatch.setattr(survival.watermark, "THRESHOLD", -100.0)
    assert survival.count_false_alarms(pictures, 8)[0] == 8
