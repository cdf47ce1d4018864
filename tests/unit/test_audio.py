"""Reading audio: every kind of unusable recording must be named with its own cause, and nothing runs unasked."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.errors import AudioError
from speechtx.frontend.audio import load_audio

RAMP = (np.arange(16000) - 8000) / 32768  # one second; each sample is its own position


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "ramp.wav"
    soundfile.write(path, RAMP, 16000, subtype="PCM_16")
    return path


def load(path: Path | str, **options: object) -> np.ndarray:
    return load_audio(str(path), sample_rate=16000, **options)  # type: ignore[arg-type]


def sphere(path: Path, samples: np.ndarray, *, declared: int | None = None, coding: str = "pcm") -> Path:
    """A NIST sphere file as in AN4: 1,024 bytes of header, 16-bit samples, big endian."""
    header = (
        "NIST_1A\n   1024\n"
        f"sample_count -i {len(samples) if declared is None else declared}\n"
        "sample_rate -i 16000\nchannel_count -i 1\nsample_n_bytes -i 2\nsample_byte_format -s2 10\nsample_sig_bits -i 16\n"
        f"sample_coding -s{len(coding)} {coding}\nend_head\n"
    )
    path.write_bytes(header.encode().ljust(1024) + samples.astype(">i2").tobytes())
    return path


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_samples_come_back_exactly(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"ramp.{kind}"
    soundfile.write(path, RAMP, 16000, subtype="PCM_16")
    samples = load(path)
    assert samples.dtype == np.float32
    assert np.array_equal(samples, RAMP.astype(np.float32))


def test_sphere_files_of_an4_are_read(tmp_path: Path) -> None:
    path = sphere(tmp_path / "a.sph", np.arange(-500, 500))
    assert np.array_equal(load(path), (np.arange(-500, 500) / 32768).astype(np.float32))


def test_a_piece_is_exactly_the_samples_between_start_and_end(wav: Path) -> None:
    assert np.array_equal(load(wav, start=0.25, end=0.5), RAMP[4000:8000].astype(np.float32))
    assert np.array_equal(load(wav, start=0.75), RAMP[12000:].astype(np.float32))


def test_a_piece_may_end_half_a_second_late_but_not_later(wav: Path) -> None:
    assert len(load(wav, start=0.5, end=1.4)) == 8000
    with pytest.raises(AudioError, match=r"from 0.5 to 1.6 s lies outside a recording of 1.000 s"):
        load(wav, start=0.5, end=1.6)


@pytest.mark.parametrize(("start", "end"), [(1.0, None), (2.0, 3.0), (0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (float("nan"), None)])
def test_pieces_outside_the_recording_or_empty_are_refused(wav: Path, start: float, end: float | None) -> None:
    with pytest.raises(AudioError, match=r"ramp.wav: (a|the) piece"):
        load(wav, start=start, end=end)


def test_speed_applies_to_the_piece(wav: Path) -> None:
    assert len(load(wav, start=0.0, end=0.5, speed=1.1)) == round(8000 / 1.1)


def test_another_rate_is_an_error_unless_resampling_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "phone.wav"
    t = np.arange(8000) / 8000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 500 * t), 8000)
    with pytest.raises(AudioError, match="8000 Hz, not 16000"):
        load(path)
    samples = load(path, resample=True)
    expected = 0.5 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    assert len(samples) == 16000
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=2e-3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"nowhere.wav: cannot be read: No such file"):
        load(tmp_path / "nowhere.wav")


def test_a_directory_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cannot be read"):
        load(tmp_path)


def test_empty_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.wav", tmp_path / "text.wav"
    empty.touch()
    text.write_text("this is not audio\n" * 100)
    with pytest.raises(AudioError, match=r"empty.wav: the file is empty"):
        load(empty)
    with pytest.raises(AudioError, match=r"text.wav: not an audio file that can be decoded: .*ormat"):
        load(text)


def test_a_header_without_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "silent.wav"
    soundfile.write(path, np.zeros(0), 16000)
    with pytest.raises(AudioError, match="holds no samples"):
        load(path)


def test_a_truncated_wav_is_found_though_its_samples_could_be_read(wav: Path) -> None:
    wav.write_bytes(wav.read_bytes()[:-1000])
    assert len(soundfile.read(wav)[0]) == 15500  # the library does not complain
    with pytest.raises(AudioError, match=r"truncated: its header announces 32044 bytes, the file has 31044"):
        load(wav)


def test_a_truncated_sphere_file_is_found(tmp_path: Path) -> None:
    path = sphere(tmp_path / "cut.sph", np.arange(900), declared=1000)
    with pytest.raises(AudioError, match=r"truncated: its header announces 3024 bytes, the file has 2824"):
        load(path)


def test_a_truncated_flac_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48000), 16000)
    path.write_bytes(path.read_bytes()[:40000])
    with pytest.raises(AudioError, match=r"cut.flac: (truncated or corrupt|not an audio file)"):
        load(path)


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_wav_written_to_a_pipe_does_not_count_as_truncated(wav: Path, declared: int) -> None:
    content = bytearray(wav.read_bytes())
    content[40:44] = struct.pack("<I", declared)
    wav.write_bytes(content)
    assert len(load(wav)) == 16000


def test_several_channels_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.zeros((100, 2)), 16000)
    with pytest.raises(AudioError, match=r"has 2 channels; .*remix"):
        load(path)


def test_nan_samples_are_found_with_their_position(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    samples = np.zeros(1000)
    samples[123] = np.nan
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"NaN or infinite samples, the first at 123"):
        load(path)


def test_a_command_does_not_run_unless_allowed(tmp_path: Path, wav: Path) -> None:
    witness = tmp_path / "ran"
    command = f"touch {witness}; cat {wav} |"
    with pytest.raises(AudioError, match="--allow-pipes"):
        load(command)
    assert not witness.exists()
    assert np.array_equal(load(command, allow_pipes=True), RAMP.astype(np.float32))
    assert witness.exists()


def test_a_failing_command_shows_what_it_said() -> None:
    with pytest.raises(AudioError, match=r"exit status 3: no disk"):
        load("echo no disk >&2; exit 3 |", allow_pipes=True)


def test_segments_of_one_command_run_it_once(tmp_path: Path, wav: Path) -> None:
    log = tmp_path / "log"
    command = f"echo run >> {log}; cat {wav} |"
    pieces = [load(command, allow_pipes=True, start=s, end=s + 0.25) for s in (0.0, 0.25, 0.5)]
    assert np.array_equal(np.concatenate(pieces), RAMP[:12000].astype(np.float32))
    assert log.read_text() == "run\n"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_audio_error_or_samples_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.wav"
    kind = data.draw(st.sampled_from(["WAV", "FLAC", "SPH"]))
    if kind == "SPH":
        sphere(path, np.arange(200))
    else:
        soundfile.write(path, RAMP[:200], 16000, format=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 120) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        samples = load(path, resample=True)
    except AudioError as err:
        assert str(path) in str(err)
    else:
        assert samples.ndim == 1
        assert np.isfinite(samples).all()
