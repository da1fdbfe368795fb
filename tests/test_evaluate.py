"""evaluate.py: the forms of corpora, its sums, the comparison; once through against the real server."""

import json
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import soundfile
from scripted import speaking
from servers import ROOT, run_script
from speech import sparse_silence, talk, write

from voxtral_client.errors import UserError
from voxtral_client.media import AudioError, AudioFile
from voxtral_measure import evaluate, word_errors
from voxtral_measure.corpus import utterances


def fill(folder, files: dict[str, str]):
    """Write text files; where audio belongs, an empty file does for finding it."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def found(path) -> list[tuple]:
    return [(item.name, item.audio.name, item.text, item.group) for item in utterances(path)]


def test_librispeech(tmp_path):
    files = {"84-1-0000.flac": "", "84-1-0001.flac": "", "84-1.trans.txt": "84-1-0000 GO ON\n84-1-0001 STOP\n"}
    files = {f"dev/84/1/{name}": text for name, text in files.items()}
    files |= {"dev/9/2/9-2-0000.wav": "", "dev/9/2/9-2.trans.txt": "9-2-0000 YES\n", "SPEAKERS.txt": "84 | M\n"}
    assert found(fill(tmp_path, files)) == [
        ("84-1-0000", "84-1-0000.flac", "GO ON", "84"),
        ("84-1-0001", "84-1-0001.flac", "STOP", "84"),
        ("9-2-0000", "9-2-0000.wav", "YES", "9"),
    ]


def test_folder_with_texts(tmp_path):
    fill(
        tmp_path, {"a/one.mp3": "", "a/one.txt": "Eins.\n", "two.wav": "", "two.txt": "Zwei", "README.txt": "no audio"}
    )
    assert found(tmp_path) == [("a/one.mp3", "one.mp3", "Eins.", "a"), ("two.wav", "two.wav", "Zwei", ".")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", 'path,sentence,client_id\nx.wav,"go, on",ann\ny.wav,stop,bob\n'),
        ("m.tsv", "client_id\tpath\tsentence\nann\tx.wav\tgo, on\nbob\ty.wav\tstop\n"),
        (
            "m.jsonl",
            '{"audio_filepath": "x.wav", "text": "go, on", "speaker": "ann", "duration": 1.5}\n\n'
            '{"audio_filepath": "y.wav", "text": "stop", "speaker": "bob"}\n',
        ),
    ],
)
def test_manifests(tmp_path, name, text):
    fill(tmp_path, {name: text})
    assert found(tmp_path / name) == [("x.wav", "x.wav", "go, on", "ann"), ("y.wav", "y.wav", "stop", "bob")]
    assert utterances(tmp_path / name)[0].audio == tmp_path / "x.wav"


def test_common_voice(tmp_path):
    """As it is published: nothing is quoted, a text may begin with a quotation mark, and the audio lies in clips/."""
    text = '\ufeffclient_id\tpath\tsentence\tage\ns1\ta.mp3\t"Seven three nine\t\ns1\tb.mp3\tKilo\u2028 oscar\t\n'
    fill(tmp_path, {"test.tsv": text + 's2\tsub\\c.mp3\t"Stop."\ttwenties\n', "clips/a.mp3": "", "clips/sub/c.mp3": ""})
    assert found(tmp_path / "test.tsv") == [
        ("a.mp3", "a.mp3", '"Seven three nine', "s1"),
        ("b.mp3", "b.mp3", "Kilo\u2028 oscar", "s1"),
        ("sub\\c.mp3", "c.mp3", '"Stop."', "s2"),
    ]
    audio = [item.audio.relative_to(tmp_path) for item in utterances(tmp_path / "test.tsv")]
    assert list(map(str, audio)) == ["clips/a.mp3", "b.mp3", "clips/sub/c.mp3"]


def test_other_files_beside(tmp_path):
    """Annotations and pictures are no recordings; names in capitals are the same; what has no text is not dropped."""
    names = "a/talk.TextGrid a/talk.wav a/walk.eaf a/walk.jpg a/walk.WAV a/run.flac a/run.wav a/lone.wav notes.md"
    texts = {"a/talk.txt": "\ufefftalk", "a/walk.TXT": "walk", "a/run.txt": "run", "README.txt": "no audio"}
    texts |= {"a/l/1-2-3.flac": "", "a/l/1-2.trans.txt": "\ufeff1-2-3 GO"}
    fill(tmp_path, dict.fromkeys(names.split(), "") | texts)
    assert sorted(found(tmp_path), key=str) == [
        ("1-2-3", "1-2-3.flac", "GO", "1"),
        ("a/lone.wav", "lone.wav", None, "a"),
        ("a/run.flac", "run.flac", "run", "a"),
        ("a/run.wav", "run.wav", None, "a"),
        ("a/talk.wav", "talk.wav", "talk", "a"),
        ("a/walk.WAV", "walk.WAV", "walk", "a"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.csv", "where,what\nx.wav,go\n", "no audio; name it one of: audio, path"),
        ("m.jsonl", '{"audio": "x.wav"}\n', "entry 1 has no text"),
        ("m.jsonl", "x.wav go\n", "each line must be an object"),
        ("m.csv", "audio,text\nx.wav,go\nx.wav,go\n", "x.wav is named twice"),
        ("m.csv", 'audio,text\nx.wav,"go\ny.wav,stop\n', "a quotation mark is not closed"),
        ("m.csv", 'audio,text\nx.wav,"go\ny.wav,"stop\n', "a quotation mark is not closed"),
        ("m.csv", "audio,text\nx.wav,go, on\n", "entry 1 has more columns than the head line"),
        ("m.tsv", 'audio\ttext\nx.wav\t"go\non"\n', "entry 2 has no text"),
        ("m.xml", "<x/>", "give a folder, or a file ending in"),
        ("m.csv", "audio,text\n", "no lines there"),
        ("a.trans.txt", "a-1 GO\n", "no audio a-1 beside it"),
        ("a.txt", "text alone", "talk.wav and talk.txt"),
    ],
)
def test_corpora_that_make_no_sense(tmp_path, name, text, said):
    fill(tmp_path, {name: text})
    with pytest.raises(UserError, match=said):
        utterances(tmp_path if name.endswith(".txt") else tmp_path / name)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "words", "substitutions", "deletions", "insertions"),
    [
        ("a b c d", "a b c d", 4, 0, 0, 0),
        ("a b c d", "a x c", 4, 1, 1, 0),
        ("a b", "a a b b", 2, 0, 0, 2),
        ("a b", "", 2, 0, 2, 0),
        ("", "a b", 0, 0, 0, 2),
        ("", "", 0, 0, 0, 0),
    ],
)
def test_counts(reference, hypothesis, words, substitutions, deletions, insertions):
    wanted = {"words": words, "substitutions": substitutions, "deletions": deletions, "insertions": insertions}
    assert word_errors.count(reference, hypothesis) == wanted


def test_sums_weigh_words_not_files():
    counts = [
        word_errors.count("a b c d e f g h", "a b c d e f g h"),
        word_errors.count("a b", "x y z"),
        word_errors.count("", "a"),
    ]
    assert word_errors.add(counts) == {
        "files": 3, "words": 10, "substitutions": 2, "deletions": 0, "insertions": 2, "wer": 0.4
    }  # fmt: skip
    assert word_errors.add([word_errors.count("", "a")])["wer"] is None


def test_normalisation():
    assert (
        word_errors.normalizer("english")("Mr. Brown's  colour, isn't it? Twenty-one!")
        == "mister brown is color is not it 21"
    )
    assert word_errors.normalizer("basic")("Größe, zwei;  DREI!") == "größe zwei drei"
    assert word_errors.normalizer("none")("As  it,\nis.") == "As it, is."
    for name in word_errors.NORMALIZERS:  # what nobody sees is no error
        assert word_errors.normalizer(name)("\ufeffyester\u200bday\u200f \u2060") == "yesterday"


def kept(tmp_path, name: str, hypotheses: list[str], normalize: str = "basic"):
    references = ["a b c d e", "f g h i j", "k l m n o"]
    files = [
        {"name": f"{i}.wav", "group": "ann" if i < 2 else "bob", "reference": r, "hypothesis": h}
        | word_errors.count(r, h)
        for i, (r, h) in enumerate(zip(references, hypotheses, strict=True))
    ]
    path = tmp_path / name
    path.write_text(json.dumps({"normalize": normalize, "files": files, "all": word_errors.add(files)}))
    return str(path)


def test_compare(tmp_path, capsys):
    before = kept(tmp_path, "before.json", ["a b c d e", "f g x i j", "k l m n o"])
    after = kept(tmp_path, "after.json", ["a b c", "f g h i j", "k l m n o"])
    assert evaluate.main(["--compare", before, after]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[-7:] for line in lines if "%" in line and "confidence" not in line}
    assert rows["0.wav"] == ["5", "0.00", "%", "40.00", "%", "+40.00", "%"]
    assert rows["1.wav"] == ["5", "20.00", "%", "0.00", "%", "-20.00", "%"]
    assert rows["ann"] == ["10", "10.00", "%", "20.00", "%", "+10.00", "%"]
    assert rows["all"] == ["15", "6.67", "%", "13.33", "%", "+6.67", "%"]
    assert "2.wav" not in rows
    assert "(2 of 3 recordings differ)" in lines


def test_interval_tells_luck_from_difference():
    one = [
        ({"words": 10} | dict.fromkeys(word_errors.KINDS, 0), word_errors.count("a " * 10, "a " * 9)) for _ in range(30)
    ]
    assert word_errors.interval(one) == pytest.approx((0.1, 0.1))
    mixed = one + [(b, a) for a, b in one]
    low, high = word_errors.interval(mixed)
    assert -0.05 < low < 0 < high < 0.05


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    run = kept(tmp_path, "run.json", ["a", "b", "c"])
    other = kept(tmp_path, "other.json", ["a", "b", "c"], normalize="english")
    (tmp_path / "nonsense.json").write_text("[]")
    for second, said in (
        (other, "normalised differently"),
        (str(tmp_path / "nonsense.json"), "not a run"),
        (str(tmp_path / "none.json"), "No such file"),
    ):
        assert evaluate.main(["--compare", run, second]) == 1
        assert said in (line := capsys.readouterr().err)
        assert line.count("\n") == 1


@pytest.mark.parametrize("installed", ["in a clone", "by pip"])
def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch, capsys, installed):
    """Whoever installed with pip has no requirements-evaluate.txt."""
    monkeypatch.setattr(word_errors, "jiwer", None)
    if installed == "by pip":
        monkeypatch.setattr(evaluate, "REQUIREMENTS", tmp_path / "requirements-evaluate.txt")
    assert evaluate.main([str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: jiwer and whisper-normalizer are missing: {sys.executable} -m pip install ")
    needed = "jiwer whisper-normalizer" if installed == "by pip" else f"-r {ROOT}/requirements-evaluate.txt"
    assert line.endswith(f" {needed}\n")


def test_end_to_end(server, tmp_path):
    """Four recordings; one text claims two words more, and one a wrong word: just that is counted."""
    rows, words = ["audio,text,speaker"], 0
    for i in range(4):
        samples, said = talk(8, seed=40 + i)
        write(tmp_path / f"{i}.wav", samples)
        text = [word for word, _, _ in said]
        text = [*text, "yes", "no"] if i == 1 else ["whiskey", *text[1:]] if i == 2 else text
        words += len(text)
        rows.append(f"{i}.wav,{' '.join(text).title()}.,{'ann' if i < 2 else 'bob'}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    options = ["--url", server.url, "--normalize", "basic", "--json", tmp_path / "run.json"]
    result = run_script("evaluate.py", tmp_path / "m.csv", *options)
    assert result.returncode == 0, result.stderr
    total = json.loads((tmp_path / "run.json").read_text())["all"]
    assert total == {
        "files": 4, "words": words, "substitutions": 1, "deletions": 2, "insertions": 0, "wer": round(3 / words, 5)
    }  # fmt: skip
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.endswith("%")}
    assert lines["ann"][2:5] == ["0", "2", "0"]
    assert lines["bob"][2:5] == ["1", "0", "0"]
    assert lines["all"][3:7] == [str(words), "1", "2", "0"]
    assert "0.wav" not in lines  # nothing wrong there
    assert "yes no" in result.stdout
    again = run_script("evaluate.py", "--compare", tmp_path / "run.json", tmp_path / "run.json")
    assert "+0.00 %" in again.stdout


def test_damaged_recording_is_said_and_left_out(server, tmp_path):
    samples, said = talk(6, seed=50)
    write(tmp_path / "good.wav", samples)
    (tmp_path / "good.txt").write_text(" ".join(word for word, _, _ in said))
    write(tmp_path / "bad.flac", samples)
    data = bytearray((tmp_path / "bad.flac").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (tmp_path / "bad.flac").write_bytes(data)
    (tmp_path / "bad.txt").write_text("zero one")
    result = run_script("evaluate.py", tmp_path, "--url", server.url)
    assert result.returncode == 1
    assert "bad.flac: damaged audio" in result.stderr
    assert result.stderr.endswith("recordings: 2 found, 1 scored, 1 failed\n")
    assert "all 1 recordings" in result.stdout


def test_a_large_folder_is_read_once(tmp_path):
    """It had been listed anew for each of its texts: 13,000 pairs took hours."""
    listed = []
    sys.addaudithook(lambda event, details: listed.append(details) if event in ("os.scandir", "os.listdir") else None)
    fill(tmp_path, {f"{number}.{ending}": "yes" for number in range(300) for ending in ("wav", "txt")})
    listed.clear()
    assert len(utterances(tmp_path)) == 300
    assert len(listed) < 10


def test_the_first_interrupt_keeps_what_was_scored(tmp_path):
    with speaking() as speaker:
        for number in range(60):
            sparse_silence(tmp_path / f"{number}.wav", 60)
            (tmp_path / f"{number}.txt").write_text("one two three")
        command = [
            sys.executable,
            ROOT / "evaluate.py",
            tmp_path,
            "--url",
            speaker.url,
            "--json",
            tmp_path / "run.json",
        ]
        process = subprocess.Popen(
            [*command, "--parallel", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while speaker.granted < 8:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    run = json.loads((tmp_path / "run.json").read_text())
    assert 0 < run["all"]["files"] < 60
    assert run["left"] == 60 - run["all"]["files"]
    assert errors.endswith(f"recordings: 60 found, {run['all']['files']} scored, {run['left']} not reached\n")
    assert f"all {run['all']['files']} recordings" in output


def test_recordings_that_find_no_slot_lose_nothing(tmp_path):
    """Refused while others run, a recording begins again from its beginning."""
    with speaking(slots=1) as speaker:
        for number in range(5):
            write(tmp_path / f"{number}.wav", np.zeros(12 * 16000))
            (tmp_path / f"{number}.txt").write_text("one")
        result = run_script(
            "evaluate.py", tmp_path, "--url", speaker.url, "--json", tmp_path / "run.json", "--normalize", "none"
        )
        assert result.returncode == 0, result.stderr
        assert speaker.refused
    counts = [len(entry["hypothesis"].split()) for entry in json.loads((tmp_path / "run.json").read_text())["files"]]
    assert counts == [12 * 12.5 // 5] * 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a folder or manifest"),
        (["a", "--compare", "b", "c"], "give a folder or manifest"),
        (["--compare", "b", "c", "--json", "d"], "--compare takes two saved runs"),
        (["a", "--parallel", "0"], "1 or more"),
        (["a", "--normalize", "french"], "invalid choice"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_damage_elsewhere_is_not_this_files(tmp_path):
    """FFmpeg's errors of a file that another thread decodes at the same time: the healthy one is not called damaged."""
    path = tmp_path / "healthy.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for number in range(100):  # a recorder's clock: now and then 50 ms without sound
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 99, np.int16), format="s16", layout="mono")
            frame.rate, frame.pts = 16000, 1600 * number + 800 * (number // 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    soundfile.write(tmp_path / "bad.flac", np.random.default_rng(0).normal(0, 0.1, 160_000), 16000)
    data = bytearray((tmp_path / "bad.flac").read_bytes())
    data[100_000:200_000] = bytes(100_000)
    (tmp_path / "bad.flac").write_bytes(data)

    def damaged() -> None:
        with pytest.raises(AudioError, match="damaged audio"):
            list(AudioFile(tmp_path / "bad.flac").blocks())

    for number, _ in enumerate(AudioFile(path).blocks()):
        if number % 10 == 5:
            thread = threading.Thread(target=damaged)
            thread.start()
            thread.join()
    damaged()  # the errors are counted still
