"""Measure the server's word error rate on recordings whose text is known, and compare two measurements.

evaluate.py recordings/ --json int4.json       talk.wav with talk.txt beside it; or LibriSpeech's layout
evaluate.py test.csv --json bf16.json          columns audio, text and optionally speaker; also .tsv, .jsonl
evaluate.py --compare bf16.json int4.json      side by side
"""

import argparse
import itertools
import json
import sys
from contextlib import aclosing
from pathlib import Path

from voxtral_client.cli import Interrupts, Parser, add_server_options, count, run, server_from
from voxtral_client.errors import Stopped, UserError
from voxtral_client.media import AudioFile
from voxtral_client.pool import Pool, sessions_for_files, uncut
from voxtral_client.screen import Screen
from voxtral_client.timeline import Word

from . import word_errors
from .corpus import utterances

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-evaluate.txt"  # in a clone


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 for wrong usage."""
    parser = Parser(__doc__)
    parser.add_argument("corpus", nargs="?", metavar="PATH", help="folder of recordings and texts, or a manifest")
    parser.add_argument("--json", metavar="OUT.json", help="save the run with all texts")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="print two saved runs side by side")
    parser.add_argument(
        "--normalize",
        choices=word_errors.NORMALIZERS,
        help="before counting: english (Whisper's, default: case, spelling, numbers as digits), basic (case and "
        "punctuation, for other languages), none",
    )
    parser.add_argument("--parallel", type=count, metavar="N", help="recordings at once (default: 8)")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="recordings to show (default: %(default)s)")
    add_server_options(parser)
    options = parser.parse_args(argv)
    if (options.corpus is None) == (options.compare is None):
        parser.error("give a folder or manifest to measure, or --compare with two saved runs")
    if options.compare and (options.json or options.normalize or options.parallel):
        parser.error("--compare takes two saved runs as they are: no --json, --normalize, --parallel")
    if options.worst < 0:
        parser.error("--worst must be 0 or more")
    return options


def percent(entry: dict) -> str:
    """Return the error rate of a count."""
    wer = word_errors.rate(entry)
    return "    -  " if wer is None else f"{100 * wer:5.2f} %"


def row(name: str, entry: dict) -> str:
    """Return a count's line of the table."""
    kinds = "  ".join(f"{entry[kind]:6}" for kind in word_errors.KINDS)
    return f"{name[:40]:40}  {entry['words']:7}  {kinds}  {percent(entry)}\n"


HEAD = f"{'':40}  {'words':>7}  {'subst.':>6}  {'delet.':>6}  {'insert.':>6}  {'WER':>7}\n"


def table(files: list[dict], worst: int) -> str:
    """Return the table of a run: the `worst` files with their errors, the groups, and the total."""
    ranked = sorted(filter(word_errors.errors, files), key=word_errors.errors, reverse=True)[:worst]
    text = HEAD if ranked else ""
    for entry in ranked:
        text += f"{row(entry['name'], entry)}{word_errors.alignment(entry['reference'], entry['hypothesis'])}\n\n"
    text += HEAD
    for group, entries in word_errors.groups(files).items():
        text += row(group, word_errors.add(entries))
    return text + row(f"all {len(files)} recordings", word_errors.add(files))


async def evaluate(options: argparse.Namespace) -> int:
    """Transcribe the corpus, print the table and return the exit code."""
    found = utterances(options.corpus)
    corpus = [item for item in found if item.text is not None]
    sources = [AudioFile(item.audio) for item in corpus]
    name = options.normalize or "english"
    normalize, server = word_errors.normalizer(name), server_from(options)
    hypotheses, scored, failed = [""] * len(corpus), set(), set()
    if options.json:
        Path(options.json).touch()  # reports at once if it cannot be written
    with Screen() as screen:
        for item in found:
            if item.text is None:
                screen.say(f"{item.audio}: is not scored: {item.why}")
        model = (await server.model(options.model))["id"]  # reports at once what is wrong
        interrupts = Interrupts(screen.say)
        settings = {"model": model, "give_up_after": options.give_up_after}
        size = options.parallel or await sessions_for_files(server, model, 8)
        pool = Pool(server, size, interrupts.stop, screen.say, **settings)

        def status() -> tuple[str, str]:
            return "", f"{len(scored)}/{len(corpus)} recordings, {pool.transcribed:.0f} s of audio"

        async with screen.redrawn(status), aclosing(pool.run(itertools.starmap(uncut, enumerate(sources)))) as items:
            async for piece, item in items:
                if isinstance(item, Word):
                    hypotheses[piece.file] += item.text
                elif item is None:
                    scored.add(piece.file)
                elif not isinstance(item, Stopped):
                    failed.add(piece.file)
                    screen.say(f"error: {item}")
        files = []
        for number in sorted(scored):
            item, reference, hypothesis = corpus[number], normalize(corpus[number].text), normalize(hypotheses[number])
            entry = {"name": item.name, "group": item.group} | word_errors.count(reference, hypothesis)
            files.append(entry | {"reference": reference, "hypothesis": hypothesis})
        screen.say(pool.speed)
        if files:
            screen.write(table(files, options.worst))
        left = len(corpus) - len(scored) - len(failed)
        if options.json and files:
            about = {"corpus": options.corpus, "model": model, "normalize": name, "failed": len(failed), "left": left}
            saved = about | {"all": word_errors.add(files), "files": files}
            Path(options.json).write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        reasons = {"failed": len(failed), "not reached": left, "without a text": len(found) - len(corpus)}
        counts = "".join(f", {number} {reason}" for reason, number in reasons.items() if number)
        screen.say(f"recordings: {len(found)} found, {len(scored)} scored{counts}")
    if interrupts.stop.is_set() and left:
        return 130
    return 1 if failed or left else 0


def load(path: str) -> dict:
    """Return a saved run. Raises UserError for another file, OSError where it cannot be read."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        assert {"normalize", "files", "all"} <= set(saved)
    except (ValueError, AssertionError, TypeError):
        raise UserError(f"{path}: not a run that --json has saved") from None
    return saved


def compare(paths: list[str], worst: int) -> str:
    """Return the table of two saved runs side by side. Raises UserError where they cannot be compared."""
    first, second = map(load, paths)
    if first["normalize"] != second["normalize"]:
        raise UserError(f"the runs were normalised differently: {first['normalize']} and {second['normalize']}")
    others = {entry["name"]: entry for entry in second["files"]}
    pairs = [(entry, others[entry["name"]]) for entry in first["files"] if entry["name"] in others]
    if not pairs or any(a["reference"] != b["reference"] for a, b in pairs):
        raise UserError(f"{paths[0]} and {paths[1]} are of different recordings")
    title = [Path(path).stem[:12] for path in paths]
    text = f"{'':40}  {'words':>7}  {title[0]:>12}  {title[1]:>12}  {'difference':>12}\n"

    def line(name: str, a: dict, b: dict) -> str:
        wers = word_errors.rate(a), word_errors.rate(b)
        delta = "-" if None in wers else f"{100 * (wers[1] - wers[0]):+.2f} %"
        return f"{name[:40]:40}  {a['words']:7}  {percent(a):>12}  {percent(b):>12}  {delta:>12}\n"

    def change(pair: tuple[dict, dict]) -> int:
        return abs(word_errors.errors(pair[1]) - word_errors.errors(pair[0]))

    changed = sorted(filter(change, pairs), key=change, reverse=True)
    for a, b in changed[:worst]:
        text += line(a["name"], a, b)
    if changed:
        text += f"({len(changed)} of {len(pairs)} recordings differ)\n\n"
    for group, entries in word_errors.groups([entry for entry, _ in pairs]).items():
        text += line(group, word_errors.add(entries), word_errors.add(others[entry["name"]] for entry in entries))
    text += line(f"all {len(pairs)} recordings", *(word_errors.add(pair[side] for pair in pairs) for side in (0, 1)))
    low, high = word_errors.interval(pairs)
    text += f"difference with 95 % confidence: {100 * low:+.2f} to {100 * high:+.2f} % (bootstrap over recordings)\n"
    missing = len(first["files"]) + len(second["files"]) - 2 * len(pairs)
    return text + (f"{missing} recordings are in one run only and are left out\n" if missing else "")


async def main_loop(options: argparse.Namespace) -> int:
    """Measure or compare, and return the exit code."""
    if options.compare:
        print(compare(options.compare, options.worst), end="")
        return 0
    if word_errors.jiwer is None:
        needed = f"-r {REQUIREMENTS}" if REQUIREMENTS.exists() else "jiwer whisper-normalizer"
        raise UserError(f"jiwer and whisper-normalizer are missing: {sys.executable} -m pip install {needed}")
    return await evaluate(options)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(main_loop(parse(argv)))
