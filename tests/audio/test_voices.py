import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.errors import AudioError
from audio.voice_file import file_name
from audio.voices import LibraryFull, Reference, UnknownVoice, UnusableVoice, Voice, VoiceExists, VoiceLibrary
from tests.audio.voice_makers import add, add_the_same, add_up_to_the_limit, read_and_write, reference

PROCESSES = multiprocessing.get_context("spawn")
NAMES = ["anna", "Anna", "Ben 2", "a.b-c_d", "7", "..x", "x" * 255]
TRAPS = ["", ".", "..", "...", "a/b", "../a", "..\\a", "/etc/passwd", "a\0b", "a\nb", " a", "a ", "é", "x" * 256, "C:a"]


def same(a: Voice, b: Voice) -> bool:
    facts = ("name", "codec", "sample_rate", "samples_per_frame", "description", "created_at", "digest")
    assert [getattr(a, f) for f in facts] == [getattr(b, f) for f in facts]
    assert [r.text for r in a.references] == [r.text for r in b.references]
    for r, s in zip(a.references, b.references, strict=True):
        np.testing.assert_array_equal(r.codes, s.codes, strict=True)
    return True


def names(library: VoiceLibrary) -> list[str]:
    return [v.name for v in library.list()]


@pytest.mark.parametrize("name", NAMES)
def test_a_voice_survives_a_restart(name: str, tmp_path: Path) -> None:
    added = add(VoiceLibrary(tmp_path / "voices"), name, reference(1, 20), reference(2, 30, most=1 << 17))
    found = VoiceLibrary(tmp_path / "voices").get(name)
    assert same(found, added)
    assert [r.codes.dtype for r in found.references] == [np.int16, np.int32]
    np.testing.assert_array_equal(found.references[1].codes, reference(2, 30, most=1 << 17).codes)
    assert (found.frames, found.duration) == (50, pytest.approx(50 * 2048 / 44100))
    assert found.created_at == pytest.approx(time.time(), abs=60)


def test_names_that_differ_in_case_alone_are_different_voices(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    for name in NAMES:
        add(library, name)
    assert names(library) == sorted(NAMES)
    assert len({p.name.lower() for p in tmp_path.glob("*.safetensors")}) == len(NAMES)


@pytest.mark.parametrize("name", TRAPS)
def test_a_name_that_could_be_a_path_is_refused(name: str, tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path / "voices")
    add(library, "anna")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AudioError, match="cannot be a voice's name"):
        add(library, name)
    with pytest.raises(AudioError, match="cannot be a voice's name"):
        library.rename("anna", name)
    for verb in (library.get, library.delete, lambda n: library.rename(n, "ben")):
        with pytest.raises(UnknownVoice):
            verb(name)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != ".lock") == before or names(library) == ["anna"]
    assert [p.name for p in tmp_path.iterdir()] == ["voices"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aZ9 ._-/\\:\0\n\u00e9\ud800"), max_size=300))
def test_any_text_becomes_a_plain_file_name(name: str) -> None:
    file = file_name(name)
    assert Path(file).name == file and len(file) < 100 and not file.startswith(".")


def test_an_unknown_voice_is_an_error_that_lists_those_there_are(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    with pytest.raises(UnknownVoice, match=r"no voice 'eve'; there are none yet"):
        library.get("eve")
    for i in range(23):
        add(library, f"v{i:02}")
    with pytest.raises(UnknownVoice, match=r"no voice 'eve'; there are 'v00', 'v01', .*'v19' and 3 more$"):
        library.get("eve")
    with pytest.raises(UnknownVoice, match=r"no voice '\\ud800'"):
        library.get("\ud800")


def test_a_taken_name_is_refused_and_the_voice_stays(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    anna, ben = add(library, "anna"), add(library, "ben", reference(3))
    with pytest.raises(VoiceExists, match="'anna'"):
        add(library, "anna", reference(9))
    with pytest.raises(VoiceExists, match="'anna'"):
        library.rename("ben", "anna")
    assert same(library.get("anna"), anna) and same(library.get("ben"), ben)


def test_rename_and_delete(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    anna = add(library, "anna")
    renamed = library.rename("anna", "Berta")
    assert renamed.digest == anna.digest and renamed.created_at == anna.created_at
    assert names(library) == ["Berta"] and same(library.get("Berta"), renamed)
    library.delete("Berta")
    assert names(library) == []
    with pytest.raises(UnknownVoice):
        library.delete("Berta")
    assert [p.name for p in tmp_path.iterdir()] == [".lock"], "nothing is left behind"


def test_a_new_description_changes_nothing_else(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    anna = add(library, "anna")
    described = library.describe("anna", "deep and slow")
    assert described.description == "deep and slow" and described.digest == anna.digest
    assert same(VoiceLibrary(tmp_path).get("anna"), described)
    with pytest.raises(UnknownVoice):
        library.describe("berta", "nobody")


def test_the_digest_covers_every_code_the_text_and_the_codec(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    one = reference()
    changed = one.codes.copy()
    changed[9, 19] ^= 1
    split = [Reference(one.codes[:, :10], one.text), Reference(one.codes[:, 10:], "")]
    variants = [[one], [Reference(changed, one.text)], [Reference(one.codes, one.text + " ")], split, [one, one]]
    digests = [add(library, f"v{i}", *refs).digest for i, refs in enumerate(variants)]
    digests.append(add(library, "other", one, codec="codec-2").digest)
    assert len(set(digests)) == len(digests)
    assert add(library, "again", Reference(one.codes.astype(np.int32), one.text)).digest == digests[0]


def test_codes_of_another_codec_are_listed_and_not_used(tmp_path: Path) -> None:
    add(VoiceLibrary(tmp_path), "anna", codec="codec-1")
    library = VoiceLibrary(tmp_path, codec="codec-2")
    assert names(library) == ["anna"]
    with pytest.raises(UnusableVoice, match="'anna' was made with codec codec-1, and this one is codec-2"):
        library.get("anna")
    assert VoiceLibrary(tmp_path, codec="codec-1").get("anna").name == "anna"


@pytest.mark.parametrize(
    "codes, message",
    [
        (np.zeros((10, 0), np.int64), r"int64 \[10, 0\]; they must be integers"),
        (np.zeros(10, np.int64), r"int64 \[10\]"),
        (np.zeros((10, 2), np.float32), "float32"),
        (np.full((10, 2), -1), "go from -1 to -1"),
        (np.full((10, 2), 1 << 31), "2147483648"),
    ],
)
def test_codes_that_are_no_codes_are_refused(codes: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=message):
        add(VoiceLibrary(tmp_path), "anna", Reference(codes, "text"))


def test_limits_of_number_and_size(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path, max_voices=2, max_bytes=4000)
    with pytest.raises(AudioError, match=r"takes .* bytes; at most 4000"):
        add(library, "anna", reference(frames=1000))
    with pytest.raises(AudioError, match="at least one reference"):
        library.add("anna", [], codec="c", sample_rate=1, samples_per_frame=1)
    add(library, "anna")
    add(library, "ben")
    with pytest.raises(LibraryFull, match="2 voices, and 2 are allowed"):
        add(library, "carl")
    library.delete("anna")
    add(library, "carl")
    assert names(library) == ["ben", "carl"]


def voice_path(folder: Path, name: str) -> Path:
    return folder / file_name(name)


def spoil(data: bytes, how: str) -> bytes:
    header = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + header])
    match how:
        case "empty":
            return b""
        case "cut":
            return data[:-30]
        case "noise":
            return bytes(range(256)) * 4
        case "huge header":
            return b"\xff" * 8 + data[8:]
        case "one code":
            return data[:-1] + bytes([data[-1] ^ 1])
        case "no metadata":
            del facts["__metadata__"]
        case "deep metadata":
            facts["__metadata__"]["voice"] = "[" * 100_000
        case "odd metadata":
            facts["__metadata__"]["voice"] = facts["__metadata__"]["voice"].replace(
                '"created_at": ', '"created_at": 1e999'
            )
            facts["__metadata__"]["voice"] = facts["__metadata__"]["voice"].replace("44100", "Infinity")
        case "other name":
            facts["__metadata__"]["voice"] = facts["__metadata__"]["voice"].replace("anna", "eve")
    changed = json.dumps(facts).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + header :]


@pytest.mark.parametrize(
    "how",
    ["empty", "cut", "noise", "huge header", "one code", "no metadata", "deep metadata", "odd metadata", "other name"],
)
def test_a_damaged_file_is_passed_over_with_a_warning_and_named_when_asked_for(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = VoiceLibrary(tmp_path)
    add(library, "anna")
    add(library, "ben")
    path = voice_path(tmp_path, "anna")
    path.write_bytes(spoil(path.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        assert names(library) == ["ben"] and names(library) == ["ben"]
    assert [path.name in r.message for r in caplog.records] == [True], "one warning, not one a listing"
    with pytest.raises(UnusableVoice, match=f"'anna' cannot be used: .*{path.name}"):
        library.get("anna")
    with pytest.raises(VoiceExists):
        add(library, "anna")
    library.delete("anna")
    add(library, "anna")
    assert names(library) == ["anna", "ben"]


def test_what_another_process_changes_is_seen_at_the_next_call(tmp_path: Path) -> None:
    here, there = VoiceLibrary(tmp_path), VoiceLibrary(tmp_path)
    first = add(there, "anna", reference(1))
    assert same(here.get("anna"), first) and here.get("anna") is here.get("anna"), "read once while nothing changes"
    there.delete("anna")
    with pytest.raises(UnknownVoice):
        here.get("anna")
    second = add(there, "anna", reference(2))
    assert same(here.get("anna"), second)
    there.rename("anna", "berta")
    assert names(here) == ["berta"]


def test_what_a_writer_left_behind_when_it_died_is_cleared_away(tmp_path: Path) -> None:
    library = VoiceLibrary(tmp_path)
    (tmp_path / ".new-abc").write_bytes(b"half a voice")
    assert names(library) == []
    add(library, "anna")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", file_name("anna")]


def run_together(work: Callable[..., None], folder: Path, count: int) -> list[Any]:
    """What `count` processes put into a queue, one item each, when they start at the same moment."""
    results, barrier = PROCESSES.Queue(), PROCESSES.Barrier(count)
    workers = [PROCESSES.Process(target=work, args=(folder, i, barrier, results)) for i in range(count)]
    for w in workers:
        w.start()
    try:
        return [results.get(timeout=60) for _ in workers]
    finally:
        for w in workers:
            w.join(timeout=5)
            w.kill()


def test_of_those_who_add_the_same_name_at_the_same_time_one_succeeds(tmp_path: Path) -> None:
    winners = {i: me for me, won in run_together(add_the_same, tmp_path, 4) for i in won}
    counts = sum(len(p.name) > 0 for p in tmp_path.glob("*.safetensors"))
    assert sorted(winners) == list(range(30)) and counts == 30
    library = VoiceLibrary(tmp_path)
    for i, me in winners.items():
        assert library.get(f"v{i}").references[0].text == reference(me).text


def test_no_more_voices_are_added_together_than_are_allowed(tmp_path: Path) -> None:
    assert sum(run_together(add_up_to_the_limit, tmp_path, 3)) == 10
    assert len(names(VoiceLibrary(tmp_path))) == 10


def test_readers_never_see_half_a_voice(tmp_path: Path) -> None:
    found = run_together(read_and_write, tmp_path, 4)
    assert [damaged for damaged, _ in found] == [[]] * 4
    assert sum(reads for _, reads in found) > 0, "the readers saw nothing at all"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "done 0", "done 1"]


def test_a_folder_of_files_that_are_no_voices_is_an_empty_library(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    os.mkdir(tmp_path / "folder.safetensors")
    assert names(VoiceLibrary(tmp_path)) == []
