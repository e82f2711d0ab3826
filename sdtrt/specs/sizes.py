"""Sizes of calls, and the ranges of them that an engine serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import DEFAULT_TOKENS, MAX_DIGITS, MAX_PIXELS, SIZE_MULTIPLE


def check_size(name: str, pixels: int) -> None:
    """Raise `UsageError` unless `pixels` is a positive multiple of 8, and no more than any model can draw."""
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"{name} must be at most {MAX_PIXELS}, got {pixels}", hint=f"use --{name} {MAX_PIXELS} or less"
        )
    if pixels > 0 and pixels % SIZE_MULTIPLE == 0:
        return
    nearest = max(SIZE_MULTIPLE, (pixels + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE)
    raise UsageError(f"{name} must be a multiple of {SIZE_MULTIPLE}, got {pixels}", hint=f"use --{name} {nearest}")


@dataclass(frozen=True)
class Range:
    """Bounds of one dimension, and the value that an engine is tuned for: `min <= opt <= max`, all at least 1."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"a range must satisfy 1 <= MIN <= OPT <= MAX, got {self.min}:{self.opt}:{self.max}",
                hint="write it as N or MIN:OPT:MAX, as in --height 512 or --height 384:512:768",
            )

    @classmethod
    def of(cls, value: int) -> Range:
        """The range of one value."""
        return cls(value, value, value)

    @classmethod
    def parse(cls, text: str, option: str) -> Range:
        """Read `N` or `MIN:OPT:MAX`; `option` names what is parsed in the error.

        Raises:
            UsageError: for a text of another form, and for bounds that are not in order or less than 1.
        """
        parts = [part.strip() for part in text.split(":")]  # more than `int` would strip: control characters too
        if len(parts) not in (1, 3) or not all(part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
            raise UsageError(f"{option} must be N or MIN:OPT:MAX, got {text!r}", hint=f"as in {option} 512:512:768")
        numbers = [int(part) for part in parts]
        return cls.of(numbers[0]) if len(numbers) == 1 else cls(*numbers)

    def scaled(self, factor: int) -> Range:
        """The range with every bound multiplied by `factor`."""
        return Range(self.min * factor, self.opt * factor, self.max * factor)

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Sizes:
    """One concrete size of a UNet call: `batch` rows (with guidance: two an image), pixels, prompt tokens."""

    batch: int
    height: int
    width: int
    tokens: int = DEFAULT_TOKENS

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.width}x{self.height} pixels, {self.tokens} tokens"


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine accepts: ranges of UNet batch rows, pixels and prompt tokens."""

    batch: Range
    height: Range
    width: Range
    tokens: Range = field(default_factory=lambda: Range.of(DEFAULT_TOKENS))

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            bounds: Range = getattr(self, name)
            for pixels in (bounds.min, bounds.opt, bounds.max):
                check_size(name, pixels)

    @classmethod
    def of(cls, sizes: Sizes) -> Profile:
        """The profile of exactly one size (the fastest engines are those)."""
        return cls(Range.of(sizes.batch), Range.of(sizes.height), Range.of(sizes.width), Range.of(sizes.tokens))

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> Profile:
        """The profile of an engine's key, where it is plain data (`dataclasses.asdict`)."""
        return cls(**{name: Range(**bounds) for name, bounds in data.items()})

    @classmethod
    def parse(cls, text: str, default: Profile) -> Profile:
        """Read `batch=2,height=512,width=512:512:768`; what is left out is taken from `default`.

        Raises:
            UsageError: for a name that is unknown or given twice, a range that can't be read, or sizes that no profile
                may have.
        """
        ranges = {"batch": default.batch, "height": default.height, "width": default.width, "tokens": default.tokens}
        given: set[str] = set()
        for item in text.split(","):
            name, equals, bounds = item.partition("=")
            if not equals or name.strip() not in ranges:
                raise UsageError(
                    f"--profile takes {', '.join(f'{known}=RANGE' for known in ranges)}; got {item!r}",
                    hint="as in --profile batch=2,height=512,width=512:512:768",
                )
            name = name.strip()
            if name in given:
                raise UsageError(
                    f"--profile has {name} twice: {text!r}",
                    hint="give it once; for several profiles give --profile several times",
                )
            given.add(name)
            ranges[name] = Range.parse(bounds, f"--profile {name}")
        return cls(**ranges)

    def __contains__(self, sizes: Sizes) -> bool:
        return (
            sizes.batch in self.batch
            and sizes.height in self.height
            and sizes.width in self.width
            and sizes.tokens in self.tokens
        )

    @property
    def minimum(self) -> Sizes:
        """The smallest size inside."""
        return Sizes(self.batch.min, self.height.min, self.width.min, self.tokens.min)

    @property
    def optimum(self) -> Sizes:
        """The size that an engine is tuned for."""
        return Sizes(self.batch.opt, self.height.opt, self.width.opt, self.tokens.opt)

    @property
    def maximum(self) -> Sizes:
        """The largest size inside."""
        return Sizes(self.batch.max, self.height.max, self.width.max, self.tokens.max)

    def __str__(self) -> str:
        return f"batch {self.batch}, height {self.height}, width {self.width}, tokens {self.tokens}"


@dataclass(frozen=True)
class ProfileRequest:
    """The sizes that engines are to accept, as they are known before the model is read.

    Args:
        batch: of the UNet; guidance makes it twice the number of images.
        height, width: pixels; None for the model's own.
        tokens: of a prompt.
        profile: several profiles, each as `Profile.parse` reads it; what one leaves out is as above.

    Raises:
        UsageError: for a profile that can't be read, and for sizes that no profile may have.
    """

    batch: Range = field(default_factory=lambda: Range.of(2))
    height: Range | None = None
    width: Range | None = None
    tokens: Range = field(default_factory=lambda: Range.of(DEFAULT_TOKENS))
    profile: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.profiles(Sizes(2, 512, 512))  # any size of a model: what can't be read is refused now

    def given(self) -> str:
        """The sizes that differ from the defaults, as options; empty where none does."""
        default = ProfileRequest()
        return ", ".join(
            f"--{one.name}" for one in fields(self) if getattr(self, one.name) != getattr(default, one.name)
        )

    def profiles(self, native: Sizes) -> tuple[Profile, ...]:
        """The profiles that are asked for; `native` is the model's own size."""
        height, width = self.height or Range.of(native.height), self.width or Range.of(native.width)
        base = Profile(self.batch, height, width, self.tokens)
        return tuple(Profile.parse(text, base) for text in self.profile) or (base,)
