"""What is said where: progress and notes on stderr, tables on stdout, nothing when quiet."""

from __future__ import annotations

from sdtrt.common.console import Console, print_table


def test_stage_says_its_name_and_how_long_it_took(capsys):
    with Console().stage("exporting"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "exporting: 0.0 s\n"


def test_quiet_says_only_warnings(capsys):
    console = Console(quiet=True)
    console.note("a note")
    with console.stage("a stage"), console.bar("a bar", 2) as advance:
        advance()
    with console.progress("a build") as update:
        update(0.5, "half")
    console.warn("a warning")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: a warning\n"


def test_details_need_verbose(capsys):
    Console().detail("hidden")
    Console(verbose=True).detail("shown")
    assert capsys.readouterr().err == "shown\n"


def test_bar_and_progress_end_full(capsys):
    with Console().bar("steps", 3) as advance:
        for _ in range(3):
            advance()
    with Console().progress("building") as update:
        update(1.0, "done")
    assert "3/3" in (said := capsys.readouterr().err)
    assert "building: done" in said
    assert "100%" in said


def test_brackets_in_notes_are_not_markup(capsys):
    Console().note("shape [2, 4] and [red]text[/red]")
    assert capsys.readouterr().err == "shape [2, 4] and [red]text[/red]\n"


def test_piped_table_keeps_cells_whole(capsys):
    long = "x" * 150
    print_table(("name", "value"), [("[one]", long), ("two", "2")])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split() for line in captured.out.splitlines()] == [["name", "value"], ["[one]", long], ["two", "2"]]
