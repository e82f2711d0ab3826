"""What README.md and docs/ show works as it stands there, and is said in few words."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from itertools import groupby
from pathlib import Path

import pages
import pytest
import typer
from PIL import Image

from sdtrt.cli.commands import app

BLOCKS = list(pages.blocks())
OPENED = "open_pipeline("  # the program that has a test of its own
RUN = [block for block in BLOCKS if block.excuse is None and OPENED not in block.text]
SLOW = ("speed-1-sh", "verify-2-sh", "quality-1-sh", "quality-3-sh")  # other tests of `bench` and `verify` are fast
PARSED = [block for block in BLOCKS if block.excuse is not None]
SEPARATORS = ("&&", "||", ";", "|")


def of_language(blocks, language):
    """Test parameters: the blocks of one language."""
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] * (block.name in SLOW))
        for block in blocks
        if block.language == language
    ]


def commands_of(text):
    """The commands of a shell block, each as its words."""
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for separates, found in groupby(lexer, SEPARATORS.__contains__):
            if not separates:
                yield list(found)


def sdtrt_commands(text):
    """The arguments of each call of sdtrt."""
    return [command[1:] for command in commands_of(text) if Path(command[0]).name == "sdtrt"]


@functools.cache
def tree():
    """The command line: words → command."""
    root = typer.main.get_command(app)
    found = {(): root}

    def add(group, way):
        for name, command in getattr(group, "commands", {}).items():
            found[(*way, name)] = command
            add(command, (*way, name))

    add(root, ())
    return found


def check_options(arguments):
    """Raise where the command line has no such command or option."""
    way = ()
    while arguments and (*way, arguments[0]) in tree():
        way, arguments = (*way, arguments[0]), arguments[1:]
    command = tree()[way]
    assert way or arguments[:1] == ["--version"], f"no command {arguments}"
    command.make_parser(command.context_class(command)).parse_args(list(arguments))


@pytest.fixture
def place(folder, engine_dir):
    """A working folder whose `engines` are the tests' shared ones."""
    engine_dir.mkdir(exist_ok=True)
    (folder / "engines").symlink_to(engine_dir)
    return folder


@pytest.mark.parametrize("block", of_language(RUN, "sh"))
def test_the_commands_of_a_page_run(block, place, run, monkeypatch):
    if "engines prune" in block.text:  # the tests' shared engines must lose none
        monkeypatch.setenv("SDTRT_ENGINE_DIR", str(place / "own"))
    calls = list(commands_of(block.text))
    assert all(call[0] == "sdtrt" for call in calls), "mark what is not run: <!-- not run: REASON -->"
    for call in calls:
        code, _, err = run(*call[1:])
        # doctor exits with 1 where something is missing on this machine
        assert code == 0 or (call[1] == "doctor" and code == 1), err


@pytest.mark.parametrize("block", of_language(RUN, "python"))
def test_the_programs_of_a_page_run(block, place):
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})
    assert {path.suffix for path in place.iterdir()} <= {"", ".png"}


def test_the_program_that_opens_a_pipeline_makes_an_image(place):
    (block,) = (one for one in BLOCKS if OPENED in one.text)
    names = {"__name__": "__main__"}
    exec(compile(block.text + 'image.save("image.png")\n', block.name, "exec"), names)
    assert Image.open(place / "image.png").size == (128, 128)
    assert sorted(path.name for path in place.iterdir()) == ["engines", "image.png"]


@pytest.mark.parametrize("block", of_language(PARSED, "sh"))
def test_the_commands_that_are_not_run_have_options_that_exist(block):
    assert block.excuse
    for arguments in sdtrt_commands(block.text):
        check_options(arguments)


@pytest.mark.parametrize("block", of_language(PARSED, "python"))
def test_the_programs_that_are_not_run_are_programs(block):
    compile(block.text, block.name, "exec")
    sdtrt = importlib.import_module("sdtrt")
    assert all(hasattr(sdtrt, name) for name in re.findall(r"\bsdtrt\.(\w+)", block.text))


def test_the_check_of_options_finds_one_that_is_not_there():
    with pytest.raises(Exception, match="stepz"):
        check_options(["txt2img", "--prompt", "x", "--stepz", "3"])


def test_every_option_of_every_command_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    written = set(re.findall(r"--[\w-]+", text))
    options = {name for command in tree().values() for parameter in command.params for name in parameter.opts}
    assert sorted(name for name in options if name.startswith("--") and name not in written) == []


def test_every_public_name_is_documented():
    text = (pages.REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    public = importlib.import_module("sdtrt").__all__
    assert [name for name in public if not re.search(rf"\b{name}\b", text)] == []


def test_what_development_md_names_is_there():
    text = (pages.REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8")
    names = re.findall(r"`(sdtrt(?:\.\w+)+)`", text)
    assert len(names) > 20
    for name in names:
        resolve(name)
    for path in re.findall(r"`(sdtrt/[\w/.]+)`", text):
        assert (pages.REPOSITORY / path).exists(), path


def resolve(name):
    """A module, or what lies in one, by its dotted name."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, words[count:], found)
    raise ModuleNotFoundError(name)


def test_the_readme_has_at_most_700_words():
    assert len(pages.words(pages.prose(pages.README))) <= 700


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_no_sentence_is_long(page):
    most = 25 if page == pages.README else 40
    assert [text for text in pages.sentences(page) if len(pages.words(text)) > most] == []


def test_what_is_no_prose_is_not_counted(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n<!-- a comment -->\nOne [link](docs/x.md) and `code here`. Two,\nwhich goes on: it has 1.5 lines"
        "\n\n- an item\n- another. And more\n\n| a | table |\n\n```sh\nsdtrt doctor\n```\n"
    )
    found = ["One link and ….", "Two, which goes on: it has 1.5 lines", "an item", "another.", "And more"]
    assert [text.removeprefix("- ") for text in pages.sentences(page)] == found
    assert len(pages.words(pages.prose(page))) == 16


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
