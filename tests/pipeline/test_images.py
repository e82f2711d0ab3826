"""Images in and out: where they go, what they carry, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import piexif
import piexif.helper
import pytest
from factories import sha256_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sdtrt.common.console import Console
from sdtrt.common.errors import OutputError, UsageError
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.inputs.images import (
    Metadata,
    encode_image,
    format_parameters,
    parse_parameters,
    read_init_image,
    read_metadata,
    read_parameters,
)
from sdtrt.pipeline.runs import saving
from sdtrt.pipeline.runs.saving import plan_output, slug

FIELDS = {"Steps": 50, "Sampler": "PLMS", "CFG scale": 7.5, "Seed": 42, "Size": "128x96", "Version": "sdtrt 0.1.0"}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def metadata(prompt="a red circle", negative=""):
    return Metadata(format_parameters(prompt, negative, FIELDS), {"prompt": prompt, "seed": 42})


def save(plan, prompt="a red circle", seed=42, picture=PICTURE):
    return plan.save(picture, metadata(prompt), prompt=prompt, seed=seed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


# Where images go


def test_without_output_they_go_into_the_current_folder(folder):
    assert save(plan_output(None, count=1, overwrite=False)) == Path("a-red-circle-42.png")
    assert names(folder) == ["a-red-circle-42.png"]


def test_taken_names_get_a_number_and_nothing_is_overwritten(folder):
    plan = plan_output(None, count=3, overwrite=False)
    first = save(plan)
    before = first.read_bytes()
    others = [save(plan, picture=Image.new("RGB", (8, 8))) for _ in range(2)]
    assert [path.name for path in others] == ["a-red-circle-42-2.png", "a-red-circle-42-3.png"]
    assert first.read_bytes() == before


def test_overwrite_does_not_make_two_images_of_one_run_share_a_name(folder):
    plan = plan_output(Path("out"), count=2, overwrite=True)
    assert save(plan) != save(plan)


def test_a_missing_folder_is_made_with_its_parents_when_the_first_image_is_there(folder):
    plan = plan_output(Path("new/deep/out"), count=2, overwrite=False)
    assert names(folder) == []
    assert save(plan) == Path("new/deep/out/a-red-circle-42.png")


def test_the_missing_parent_of_a_file_is_made(folder):
    assert save(plan_output(Path("new/one.png"), count=1, overwrite=False)) == Path("new/one.png")


def test_a_folder_may_have_a_name_like_a_file(folder):
    (folder / "v1.5").mkdir()
    assert save(plan_output(Path("v1.5"), count=2, overwrite=False)).parent == Path("v1.5")


@pytest.mark.parametrize(
    ("suffix", "image_format"), [("png", "PNG"), ("PNG", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_the_suffix_decides_the_format(suffix, image_format, folder):
    path = save(plan_output(Path(f"one.{suffix}"), count=1, overwrite=False))
    with Image.open(path) as image:
        assert image.format == image_format
        assert image.size == PICTURE.size


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_png_and_webp_keep_every_pixel(suffix, folder):
    path = save(plan_output(Path(f"one.{suffix}"), count=1, overwrite=False))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PIXELS)


def test_an_existing_file_is_an_error_that_names_overwrite(folder):
    (folder / "one.png").write_text("precious")
    with pytest.raises(OutputError, match=re.escape("one.png exists")) as caught:
        plan_output(Path("one.png"), count=1, overwrite=False)
    assert "--overwrite" in caught.value.hint
    assert (folder / "one.png").read_text() == "precious"


def test_overwrite_replaces_a_file(folder):
    (folder / "one.png").write_text("old")
    save(plan_output(Path("one.png"), count=1, overwrite=True))
    assert Image.open("one.png").size == PICTURE.size
    assert names(folder) == ["one.png"]


def test_a_file_that_came_into_being_meanwhile_is_not_overwritten(folder):
    plan = plan_output(Path("one.png"), count=1, overwrite=False)
    (folder / "one.png").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        save(plan)
    assert (folder / "one.png").read_text() == "precious"
    assert names(folder) == ["one.png"]


def test_a_file_made_between_the_last_look_and_the_rename_is_not_overwritten(folder, monkeypatch):
    plan = plan_output(Path("one.png"), count=1, overwrite=False)
    monkeypatch.setattr(saving, "_is_taken", lambda path: False)  # the look is too early
    (folder / "one.png").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        save(plan)
    assert (folder / "one.png").read_text() == "precious"


def test_without_hard_links_nothing_is_overwritten_either(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    plan = plan_output(None, count=2, overwrite=False)
    first = save(plan)
    before = first.read_bytes()
    monkeypatch.setattr(saving, "_is_taken", lambda path: False)
    assert save(plan, picture=Image.new("RGB", (8, 8))).name == "a-red-circle-42-2.png"
    assert first.read_bytes() == before
    assert len(names(folder)) == 2


def test_a_link_with_a_generated_name_is_not_followed(folder, tmp_path):
    for name, target in (("a-red-circle-42.png", "outside.png"), ("a-red-circle-42-2.png", "nowhere.png")):
        (folder / name).symlink_to(tmp_path / target)
    (tmp_path / "outside.png").write_text("precious")
    assert save(plan_output(None, count=1, overwrite=False)).name == "a-red-circle-42-3.png"
    assert (tmp_path / "outside.png").read_text() == "precious"
    assert not (tmp_path / "nowhere.png").exists()


def test_a_dangling_link_counts_as_existing(folder, tmp_path):
    (folder / "one.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(OutputError, match="exists"):
        plan_output(Path("one.png"), count=1, overwrite=False)


@pytest.mark.parametrize("target", ["nowhere.png", "outside.png"])
def test_overwrite_replaces_a_link_and_not_what_it_points_to(target, folder, tmp_path):
    (tmp_path / "outside.png").write_text("precious")
    (folder / "one.png").symlink_to(tmp_path / target)
    with pytest.raises(OutputError, match="exists") as caught:
        plan_output(Path("one.png"), count=1, overwrite=False)
    assert "--overwrite" in caught.value.hint
    saving.check_files(folder, ["one.png"], overwrite=True)
    save(plan_output(Path("one.png"), count=1, overwrite=True))
    assert not (folder / "one.png").is_symlink()
    assert (tmp_path / "outside.png").read_text() == "precious"
    assert not (tmp_path / "nowhere.png").exists()


def test_several_images_need_a_folder(folder):
    with pytest.raises(UsageError, match="3 images"):
        plan_output(Path("one.png"), count=3, overwrite=False)


def test_an_unknown_format_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="gif") as caught:
        plan_output(Path("one.gif"), count=1, overwrite=False)
    assert "--output one.png" in caught.value.hint


def test_a_file_in_place_of_the_folder_is_an_error(folder):
    (folder / "out").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        plan_output(Path("out"), count=1, overwrite=False)
    with pytest.raises(OutputError, match="not a folder"):
        plan_output(Path("out/one.png"), count=1, overwrite=False)


@pytest.mark.parametrize("output", ["/proc/one.png", "/proc/new/out", "x" * 300 + ".png", "x" * 300 + "/one.png"])
def test_a_place_that_cannot_be_written_is_found_before_any_work(output, folder):
    if output.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError) as caught:
        plan_output(Path(output), count=1, overwrite=True)
    assert "--output" in caught.value.hint
    assert names(folder) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_found_before_any_work(folder):
    folder.chmod(0o500)
    with pytest.raises(OutputError, match="can't write"):
        plan_output(None, count=1, overwrite=False)


@pytest.mark.parametrize("output", [None, "one.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_leaves_nothing(output, overwrite, folder, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    plan = plan_output(None if output is None else Path(output), count=1, overwrite=overwrite)
    with pytest.raises(OutputError, match="no space"):
        save(plan)
    assert names(folder) == []


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(plan_output(None, count=1, overwrite=False))
    assert names(folder) == []


def test_files_have_the_usual_permissions(folder):
    (folder / "usual").write_text("")
    path = save(plan_output(None, count=1, overwrite=False))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((folder / "usual").stat().st_mode)


def test_planning_leaves_no_trace(folder):
    plan_output(Path("a/b/one.png"), count=1, overwrite=False)
    assert names(folder) == []


# Names


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, on blue!", "a-red-circle-on-blue"),
        ("", "image"),
        ("../../etc/passwd", "etc-passwd"),
        ("🦊🦊", "image"),
        ("кот и пёс", "кот-и-пёс"),
        ("a\nb\0c\x1b[31m", "a-b-c-31m"),
        ("x" * 1000, "x" * saving.SLUG_LENGTH),
    ],
)
def test_slugs(prompt, expected):
    assert slug(prompt) == expected


@given(st.text())
def test_any_prompt_makes_a_safe_file_name(prompt):
    name = slug(prompt)
    assert name
    assert len(name.encode()) <= saving.SLUG_BYTES
    assert not set(name) & set("/\\\0. \n")
    assert not name.startswith("-")


@given(st.text(alphabet=st.characters(min_codepoint=0x10000, categories=["Lo", "Nd"]), min_size=60))
def test_prompts_in_wide_scripts_still_fit_a_file_system(prompt):
    assert len(f"{slug(prompt)}-{2**63 - 1}-999.png".encode()) < 255


# What they carry

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
PROMPTS = TEXT.filter(lambda text: not any(line.startswith("Negative prompt:") for line in text.split("\n")))
FIELD_NAMES = st.from_regex(r"[A-Za-z][A-Za-z \-/]+[a-z]", fullmatch=True)


@given(PROMPTS, TEXT, st.dictionaries(FIELD_NAMES, TEXT, min_size=3, max_size=6))
def test_parameters_survive_a_round_trip(prompt, negative, fields):
    parsed = parse_parameters(format_parameters(prompt, negative, fields))
    assert (parsed.prompt, parsed.negative_prompt, dict(parsed.fields)) == (prompt, negative, fields)


def test_parameters_have_the_form_that_web_uis_write():
    text = format_parameters("a cat, asleep", "blurry", {**FIELDS, "CFG scale": 7.0, "Model": "a, b", "VAE": None})
    assert text == (
        "a cat, asleep\n"
        "Negative prompt: blurry\n"
        'Steps: 50, Sampler: PLMS, CFG scale: 7, Seed: 42, Size: 128x96, Version: sdtrt 0.1.0, Model: "a, b"'
    )


def test_parameters_without_a_negative_prompt_have_no_line_for_it():
    assert format_parameters("a cat", "", {"Steps": 5}) == "a cat\nSteps: 5"


def test_reads_what_a_web_ui_wrote():
    parsed = parse_parameters(
        "masterpiece, (cat:1.2)\nsecond line\nNegative prompt: lowres, bad\nmore\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x512, "
        'Model hash: c35782bad8, Model: realistic, Lora hashes: "add: 1, b: 2", Version: v1.10.1'
    )
    assert parsed.prompt == "masterpiece, (cat:1.2)\nsecond line"
    assert parsed.negative_prompt == "lowres, bad\nmore"
    assert parsed.fields["Schedule type"] == "Karras"
    assert parsed.fields["Lora hashes"] == "add: 1, b: 2"
    assert parsed.fields["Size"] == "512x512"


def test_text_that_is_a_prompt_alone():
    assert parse_parameters("steps: one, two").prompt == "steps: one, two"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@given(prompt=PROMPTS, negative=TEXT)
def test_every_format_carries_any_prompt(image_format, prompt, negative):
    data = encode_image(PICTURE, image_format, metadata(prompt, negative))
    file = io.BytesIO(data)
    parsed = parse_parameters(read_metadata(file).parameters)
    assert (parsed.prompt, parsed.negative_prompt) == (prompt, negative)
    assert read_metadata(file).details == {"prompt": prompt, "seed": 42}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", ["", "plain", "🦊 fox", "a\x00b\x1b[0m\r\n", "x" * 5000], ids=len)
def test_files_carry_any_prompt(suffix, prompt, folder):
    path = save(plan_output(Path(f"one.{suffix}"), count=1, overwrite=False, texts=[prompt]), prompt=prompt)
    assert read_parameters(path).prompt == prompt.replace("\0", "")
    assert read_metadata(path).details["prompt"] == prompt


@pytest.mark.parametrize(("letter", "most"), [("x", 19_999), ("ä", 7_499), ("🦊", 3_749)])
def test_a_prompt_too_long_for_a_jpeg_is_found_before_any_work(letter, most, folder):
    longest = letter * most
    plan = plan_output(Path("fits.jpg"), count=1, overwrite=False, texts=[longest])
    assert read_parameters(save(plan, prompt=longest)).prompt == longest
    with pytest.raises(UsageError, match=re.escape("one.jpg")) as caught:
        plan_output(Path("one.jpg"), count=1, overwrite=False, texts=["short", letter + longest])
    assert "one.png" in caught.value.hint
    plan_output(Path("one.png"), count=1, overwrite=False, texts=[letter * 10 * most])


def test_web_uis_find_the_text_where_they_look_for_it(folder):
    for suffix in ("png", "jpg", "webp"):
        save(plan_output(Path(f"one.{suffix}"), count=1, overwrite=False))
    with Image.open("one.png") as image:
        assert image.text["parameters"].startswith("a red circle\nSteps: 50, ")
        assert json.loads(image.text["sdtrt"])["seed"] == 42
    for suffix in ("jpg", "webp"):
        with Image.open(f"one.{suffix}") as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        assert comment[8:].decode("utf-16-be").startswith("a red circle\nSteps: 50, ")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("prompt", ["a red circle", "🦊, кот", "x" * 15_000], ids=len)
def test_the_reader_of_web_uis_reads_the_exif(suffix, prompt, folder):
    path = save(plan_output(Path(f"one.{suffix}"), count=1, overwrite=False), prompt=prompt)
    with Image.open(path) as image:
        for source in (image.info["exif"], str(path)):
            found = piexif.load(source)
            assert (
                piexif.helper.UserComment.load(found["Exif"][piexif.ExifIFD.UserComment]) == metadata(prompt).parameters
            )
            history = found["0th"][piexif.ImageIFD.ImageHistory].rstrip(b"\0")
            assert json.loads(history) == {"prompt": prompt, "seed": 42}


def test_exif_of_hardly_any_details_is_read_as_well():
    file = io.BytesIO(encode_image(PICTURE, "JPEG", Metadata("", {})))
    assert (read_metadata(file).parameters, read_metadata(file).details) == ("", {})
    file = io.BytesIO(encode_image(PICTURE, "WEBP", Metadata("a", {"a": 1})))
    assert (read_metadata(file).parameters, read_metadata(file).details) == ("a", {"a": 1})


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_same_image_is_the_same_bytes(image_format):
    assert encode_image(PICTURE, image_format, metadata()) == encode_image(PICTURE.copy(), image_format, metadata())


def test_an_image_without_text_has_none(folder):
    for suffix in ("png", "jpg"):
        PICTURE.save(f"bare.{suffix}")
        assert read_metadata(Path(f"bare.{suffix}")) is None
        assert read_parameters(Path(f"bare.{suffix}")) is None


# The init image


def init(path, picture, **options):
    picture.save(path, **options)
    return read_init_image(path)


def test_init_image_is_read_as_rgb_with_its_digest(tmp_path):
    image = init(tmp_path / "a.png", PICTURE)
    np.testing.assert_array_equal(np.asarray(image.pixels), PIXELS)
    assert len(image.sha256) == 64


def test_transparency_is_flattened_on_white(tmp_path):
    for name, picture in (
        ("rgba", Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
        ("la", Image.new("LA", (8, 8), (0, 0))),
        ("half", Image.new("RGBA", (8, 8), (0, 0, 0, 128))),
    ):
        value = init(tmp_path / f"{name}.png", picture).pixels.getpixel((0, 0))
        assert value == ((127, 127, 127) if name == "half" else (255, 255, 255))


def test_a_transparent_palette_colour_is_flattened(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    assert init(tmp_path / "p.png", picture, transparency=1).pixels.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "I;16", "RGB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    picture = Image.new("RGB", (8, 8), "white").convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    image = init(tmp_path / f"a.{suffix}", picture).pixels
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == ((128, 128, 128) if mode == "I;16" else (255, 255, 255))


def test_the_exif_orientation_is_honoured(tmp_path):
    picture = Image.new("RGB", (16, 8), "blue")
    picture.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    pixels = init(tmp_path / "a.png", picture, exif=exif).pixels
    assert pixels.size == (8, 16)
    assert pixels.getpixel((4, 2)) == (255, 0, 0)


def fixed(*numbers):
    """ICC's numbers: 16 bits before the point and 16 behind."""
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space, kind, **tags):
    """A small ICC profile (ICC.1:2022) of a colour space; its connection space is Lab for printers, else XYZ."""
    tags = {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"Wide\0" + bytes(79),
        "cprt": b"text\0\0\0\0CC0\0",
        "wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        **tags,
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    connection = b"Lab " if kind == "prtr" else b"XYZ "
    head = struct.pack(">I", start + len(data)) + bytes(4) + bytes.fromhex("02100000") + kind.encode()
    head += space.encode() + connection + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + data


GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + bytes(2)  # 2.2
ADOBE_RGB = profile(
    "RGB ",
    "mntr",
    rXYZ=b"XYZ \0\0\0\0" + fixed(0.60974, 0.31111, 0.01947),
    gXYZ=b"XYZ \0\0\0\0" + fixed(0.20528, 0.62567, 0.06087),
    bXYZ=b"XYZ \0\0\0\0" + fixed(0.14919, 0.06322, 0.74457),
    rTRC=GAMMA,
    gTRC=GAMMA,
    bTRC=GAMMA,
)
GREY_LINEAR = profile("GRAY", "mntr", kTRC=b"curv\0\0\0\0" + struct.pack(">I", 0))
# Of 16 mixtures of inks in Lab: paper is white, all inks together are black, anything else is a mid grey.
INKS = (
    struct.pack(">BBBB", 4, 3, 2, 0)
    + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    + bytes(range(256)) * 4
    + bytes([255, 128, 128] + [128, 128, 128] * 14 + [0, 128, 128])
    + bytes(range(256)) * 3
)
PRINTER = profile("CMYK", "prtr", A2B0=b"mft1\0\0\0\0" + INKS)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [("png", {}, 1), ("jpg", {"quality": 100, "subsampling": 0}, 4), ("webp", {"lossless": True}, 1), ("tif", {}, 1)],
)
def test_colours_are_converted_from_the_profile_that_comes_with_them(suffix, options, tolerance, tmp_path, capsys):
    picture = Image.new("RGB", (16, 16), (0, 255, 0))
    picture.paste((200, 120, 80), (8, 0, 16, 16))
    picture.save(tmp_path / f"a.{suffix}", icc_profile=ADOBE_RGB, **options)
    pixels = read_init_image(tmp_path / f"a.{suffix}", Console()).pixels
    # Adobe RGB's (200, 120, 80) in sRGB, by both standards' matrices and curves
    np.testing.assert_allclose(pixels.getpixel((14, 8)), (224, 121, 77), atol=tolerance)
    np.testing.assert_allclose(pixels.getpixel((2, 8)), (0, 255, 0), atol=tolerance)
    assert capsys.readouterr().err == "init image: colours converted to sRGB from its profile, Wide\n"


def test_grey_and_printers_colours_are_converted_too(tmp_path):
    grey = init(tmp_path / "a.png", Image.new("L", (8, 8), 55), icc_profile=GREY_LINEAR).pixels
    np.testing.assert_allclose(grey.getpixel((0, 0)), (128,) * 3, atol=1)
    sheet = Image.new("CMYK", (8, 8))
    sheet.paste((255, 0, 0, 0), (4, 0, 8, 8))
    for suffix in ("tif", "jpg"):
        printed = init(tmp_path / f"a.{suffix}", sheet, icc_profile=PRINTER).pixels
        assert min(printed.getpixel((0, 4))) >= 250
        np.testing.assert_allclose(printed.getpixel((7, 4)), (119,) * 3, atol=4)  # Lab's 50


def test_colours_behind_transparency_are_converted_and_the_white_is_not(tmp_path):
    picture = Image.new("RGBA", (16, 8), (200, 120, 80, 255))
    picture.paste((0, 0, 0, 0), (8, 0, 16, 8))
    pixels = init(tmp_path / "a.png", picture, icc_profile=ADOBE_RGB).pixels
    assert pixels.getpixel((12, 4)) == (255, 255, 255)
    np.testing.assert_allclose(pixels.getpixel((2, 4)), (224, 121, 77), atol=1)


def test_an_srgb_profile_changes_no_pixel_and_is_no_news(tmp_path, capsys):
    PICTURE.save(tmp_path / "a.png", icc_profile=SRGB)
    np.testing.assert_array_equal(np.asarray(read_init_image(tmp_path / "a.png", Console()).pixels), PIXELS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"no profile", "RGB", "cannot open"),
        (ADOBE_RGB[:200], "RGB", "cannot"),
        (ADOBE_RGB, "CMYK", "it is for RGB pixels, these are CMYK"),
        (PRINTER, "RGB", "it is for CMYK pixels, these are RGB"),
        (GREY_LINEAR, "RGB", "it is for GRAY pixels, these are RGB"),
    ],
)
def test_a_profile_that_can_not_be_used_is_told_and_the_colours_stay(content, mode, reason, tmp_path, capsys):
    picture = PICTURE.convert(mode)
    pixels = init(tmp_path / "a.tif", picture, icc_profile=content).pixels
    np.testing.assert_array_equal(np.asarray(pixels), np.asarray(picture.convert("RGB")))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the init image's colour profile can't be used")
    assert reason in line


def test_adobe_rgb_that_only_exif_tells_of_is_warned_of(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x8769] = {0xA005: {1: "R03"}}
    init(tmp_path / "a.jpg", PICTURE, exif=exif)
    assert "Adobe RGB" in capsys.readouterr().err


def test_sizes_come_from_the_image_or_from_the_request(tmp_path):
    image = init(tmp_path / "a.png", Image.new("RGB", (99, 41)))
    assert image.result_size(None, None) == (40, 96)
    assert image.result_size(64, None) == (64, 96)
    assert image.result_size(64, 72) == (64, 72)
    assert image.fitted(64, 72).size == (72, 64)


def test_an_image_of_the_right_size_is_not_resampled(tmp_path):
    image = init(tmp_path / "a.png", PICTURE)
    np.testing.assert_array_equal(np.asarray(image.fitted(24, 16)), PIXELS)


def test_an_image_too_small_for_a_latent_is_a_usage_error(tmp_path):
    image = init(tmp_path / "a.png", Image.new("RGB", (64, 7)))
    with pytest.raises(UsageError, match="height of 7") as caught:
        image.result_size(None, None)
    assert "--height" in caught.value.hint
    assert "512" not in caught.value.hint, "not every model's size"
    assert image.result_size(64, 64) == (64, 64)


def test_an_image_wider_than_any_model_draws_wants_a_size(tmp_path):
    image = init(tmp_path / "a.png", Image.new("1", (16392, 136)))
    with pytest.raises(UsageError, match="width of 16392 pixels, more than 16384") as caught:
        image.result_size(None, None)
    assert "--width" in caught.value.hint
    assert image.result_size(None, 512) == (136, 512)


def test_floating_point_pixels_are_refused_rather_than_clipped_to_black(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(UsageError, match="floating-point") as caught:
        read_init_image(path)
    assert "float.tif" in caught.value.message
    assert "PNG" in caught.value.hint


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
def test_integer_pixels_of_unknown_range_are_refused_rather_than_scaled_to_black(dtype, tmp_path):
    path = tmp_path / "integers.tif"
    pixels = np.arange(64, dtype=dtype).reshape(8, 8) * 4
    if dtype is np.int32:
        Image.fromarray(pixels).save(path)
    else:  # Pillow reads signed 16 bits and writes none
        Image.frombytes("I;16", (8, 8), pixels.astype("<i2").tobytes()).save(path, tiffinfo={339: 2})
    with pytest.raises(UsageError, match="range is unknown") as caught:
        read_init_image(path)
    assert "PNG" in caught.value.hint


def test_16_bits_of_known_range_are_scaled(tmp_path):
    grey = Image.fromarray(np.full((8, 8), 257 * 90, dtype=np.uint16))
    for name in ("grey.tif", "grey.png"):
        grey.save(tmp_path / name)
    (tmp_path / "grey.pgm").write_bytes(b"P5 8 8 65535\n" + bytes([90, 90]) * 64)
    for name in ("grey.tif", "grey.png", "grey.pgm"):
        assert read_init_image(tmp_path / name).pixels.getpixel((0, 0)) == (90, 90, 90), name


def bomb(width, height):
    """A PNG whose header promises more pixels than anyone wants."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("folder", "is not a file"),
        (b"", "no image format"),
        (b"not an image", "no image format"),
        (png_bytes()[:500], "can't be read"),
        (png_bytes()[:100] + bytes(200) + png_bytes()[300:], "can't be read"),
        (bomb(60000, 60000), "too large"),
        (bomb(10000, 10000), "too large"),
        (bomb(1, 2**26), "too long: of 1x67108864 pixels"),
        (bomb(8 * 129, 8), "too long"),
        (bomb(0, 10), "can't be read|no image format"),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "damaged", "bomb", "large", "thin", "wide", "zero size"],
)
def test_an_init_image_that_cannot_be_used_is_a_usage_error(content, message, tmp_path):
    path = tmp_path / "init.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_init_image(path)
    assert "init.png" in caught.value.message
    assert caught.value.hint


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_images_never_raise_anything_else(noise, position):
    good = png_bytes()
    data = good[:position] + noise + good[position + len(noise) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "init.png"
        path.write_bytes(data)
        with contextlib.suppress(UsageError):
            read_init_image(path)


def test_the_digest_is_of_the_file_whose_pixels_were_read(tmp_path, monkeypatch):
    path, other = tmp_path / "init.png", tmp_path / "other.png"
    Image.new("RGB", (8, 8), "red").save(path)
    Image.new("RGB", (8, 8), "blue").save(other)
    digest, decode = sha256_of(path), images._to_rgb

    def decoded_then_replaced(*arguments):
        pixels = decode(*arguments)
        other.replace(path)
        return pixels

    monkeypatch.setattr(images, "_to_rgb", decoded_then_replaced)
    found = images.read_init_image(path)
    assert (found.sha256, found.pixels.getpixel((0, 0))) == (digest, (255, 0, 0))
