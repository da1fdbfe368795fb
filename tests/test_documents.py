"""What the documents name exists: links, files, options, variables, error messages."""

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from servers import ROOT

from launch.settings import TABLE

LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
FILES = {name for name in subprocess.check_output(LISTED, cwd=ROOT, text=True).split("\n") if (ROOT / name).is_file()}
DOCUMENTS = sorted(name for name in FILES if name.endswith(".md"))
SCRIPTS = ["test_file_transcribe.py", "stream_microphone.py", "benchmark.py", "evaluate.py", "setup.sh", "demo.sh"]
SCRIPTS += sorted(name for name in FILES if name.startswith("scripts/"))
COMMANDS = {
    "voxtral-transcribe": SCRIPTS[0],
    "voxtral-live": SCRIPTS[1],
    "voxtral-benchmark": SCRIPTS[2],
    "voxtral-evaluate": SCRIPTS[3],
}
OTHERS = {"--middleware", "--api-key", "--max-model-len", "--distributed-executor-backend", "--api-server-count"}
OTHERS |= {"--hostname", "-h"}  # above: vllm serve's; here: Docker's, everybody's
EXAMPLES = {"talks/", "out/", "recordings/"}  # folders of the user
MADE = "tests/tiny_checkpoint/heldout"  # by a command of the document
OURS = "py sh js dart lock toml conf service md html css".split()  # a file with such an ending is this repository's
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@cache
def text(document: str) -> str:
    return (ROOT / document).read_text()


@cache
def code(document: str) -> tuple[list[str], list[str]]:
    """The lines of code blocks, continued lines joined, and what stands in backticks."""
    blocks, inline, fenced, before = [], [], False, ""
    for line in text(document).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and not before.startswith(("-", "|"))):
            blocks.append(line.strip())
        else:
            inline += INLINE.findall(line)
        before = line if line.strip() and not line.startswith("    ") else before
    return "\n".join(blocks).replace("\\\n", " ").splitlines(), inline


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text(document), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    prose = INLINE.sub("", re.sub(r"```.*?```", "", text(document), flags=re.DOTALL))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / document).parent / path if path else ROOT / document
        name = str(file.resolve().relative_to(ROOT.resolve()))
        if name not in FILES or (anchor and anchor not in anchors(name)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    """A name with a slash is a path from the root or from the document's folder; a bare one may be in any folder."""
    there = FILES | {str(parent) for name in FILES for parent in Path(name).parents}
    tops, names = {name.split("/")[0] for name in there}, {Path(name).name for name in there}
    missing = set()
    for line in itertools.chain(*code(document)):
        line = re.sub(r"\w+://\S*", "", line.replace("$PWD/", ""))
        for word in re.findall(r"(?<![\w./~<{*$-])(?:\./)?[A-Za-z_][\w.-]*(?:/[\w.-]*)*", line):
            path = word.removeprefix("./").rstrip("/.")
            folder = re.fullmatch(r"[\w.-]+/", word) and word not in EXAMPLES
            ours = folder or ("." in path and path.rpartition(".")[2] in OURS)
            if not ours and ("/" not in word.removeprefix("./") or path.split("/")[0] not in tops):
                continue  # a word, or a path of the user's
            found = path in there or str(Path(document).parent / path) in there or ("/" not in path and path in names)
            if not found and not path.startswith(MADE):
                missing.add(path)
    assert not missing


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each script's -h prints; the comment at the head of those that know no -h."""

    def ask(script: str) -> tuple[str, str]:
        source = text(script)
        if "python" in source.partition("\n")[0]:
            command = [sys.executable, ROOT / script, "-h"]
        elif "--help)" in source:
            command = [ROOT / script, "-h"]
        else:
            return script, "\n".join(re.findall(r"^#.*", source, re.MULTILINE))
        return script, subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(ask, [*SCRIPTS, "serve.sh"]))


def options(words: str) -> set[str]:
    """Options in a text; `-` and `_` are the same."""
    return {word.replace("_", "-") for word in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", words)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options(document, helps):
    """Those beside a script are its own; those that stand alone are at least one script's."""
    known = {script: options(text) for script, text in helps.items()}
    recipe = [name for name in FILES if name.startswith("tests/tiny_checkpoint/") and name.endswith(".py")]
    anyones = OTHERS.union(*known.values(), *(options(text(name)) for name in recipe))
    blocks, inline = code(document)
    unknown = {option for line in inline if re.match(r"--?[A-Za-z]", line) for option in options(line) - anyones}
    for line in blocks + inline:
        for command in re.split(r"\s#\s|[|;&]\s|\s{5,}", line):
            for script in [*SCRIPTS, *COMMANDS]:
                if found := re.search(rf"(?<![\w-])(?:\./)?{re.escape(script)}(?= |$)(.*)", command):
                    own = known[COMMANDS.get(script, script)]
                    unknown |= {f"{script} {option}" for option in options(found[1]) - own - {"-h"}}
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_variables(document, helps):
    unknown = set()
    for line in itertools.chain(*code(document)):
        for script in ("serve.sh", "setup.sh"):
            if found := re.match(rf"(.*?)(?:\./|bash ){re.escape(script)}", line):
                names = re.findall(r"(?<![\w/.-])([A-Z][A-Z0-9_]+)=", found[1])
                unknown |= {name for name in names if not re.search(rf"\b{name}\b", helps[script])}
    assert not unknown


def test_table_of_variables():
    """The README's names and defaults are those of launch/settings.py."""
    defaults = {setting.name: setting.default for setting in TABLE}
    for names, values in re.findall(r"^\| (`[A-Z][A-Z_`, ]+`) \| (.*?) \|", text("README.md"), re.MULTILINE):
        names, values = INLINE.findall(names), INLINE.findall(values)
        assert set(names) <= set(defaults)
        assert not any(defaults[name] for name in names) or values == [defaults[name] for name in names]


def test_error_messages():
    """This repository prints the messages of docs/troubleshooting.md, but for those marked as others'."""
    folders = ("launch/", "voxtral_client/", "web/", "vllm_plugin/")
    names = [name for name in FILES if name.startswith(folders) and name.endswith((".py", ".js"))]
    names += [name for name in FILES if name.endswith(".sh") or ("/" not in name and name.endswith(".py"))]
    source = "\n".join(text(name) for name in names)
    source = re.sub(r"""["`]\s*\n\s*\+?\s*f?["`]""", "", source)  # a string goes on in the next line
    unknown = set()
    for cell in re.findall(r"^\| (`.*?) \| ", text("docs/troubleshooting.md"), re.MULTILINE):
        if not cell.endswith(("(vLLM)", "(PyTorch)")):
            for message in INLINE.findall(cell):
                parts = [part.strip(" .,:;()") for part in message.removeprefix("warning: ").split("...")]
                unknown |= {part for part in parts if part not in source}
    assert not unknown


def test_workflow_names_tests_that_exist():
    assert set(re.findall(r"tests/\w+\.py", text(".github/workflows/check.yml"))) <= FILES


def test_readme_is_short():
    assert len(text("README.md").splitlines()) <= 150
