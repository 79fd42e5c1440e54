"""Units of measure: words to (dimension, scale). Unknown words after a number are labels, and are dropped."""

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit as powers of base dimensions and a scale to the base unit. A label has no dimension and scale 1."""

    powers: tuple[tuple[str, int], ...]  # sorted (dimension, power), zero powers left out
    scale: Fraction

    @property
    def known(self) -> bool:
        return bool(self.powers)


LABEL = Unit((), Fraction(1))

# dimension -> {words: scale}
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "m meter meters metre metres": "1", "km kilometer kilometers kilometre kilometres kms": "1000",
        "cm centimeter centimeters centimetre centimetres cms": "1/100",
        "mm millimeter millimeters millimetre millimetres": "1/1000", "dm decimeter decimeters": "1/10",
        "in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yds yard yards": "0.9144",
        "mi mile miles": "1609.344",
    },
    "time": {
        "s sec secs second seconds": "1", "min mins minute minutes": "60", "h hr hrs hour hours": "3600",
        "day days": "86400", "week weeks": "604800", "ms millisecond milliseconds": "1/1000",
    },
    "month": {"month months": "1", "year years yr yrs": "12"},
    "mass": {
        "g gram grams": "1", "kg kgs kilogram kilograms": "1000", "mg milligram milligrams": "1/1000",
        "lb lbs pound pounds": "453.59237", "oz ounce ounces": "28.349523125", "ton tons tonne tonnes": "1000000",
    },
    "volume": {"L l liter liters litre litres": "1", "mL ml milliliter milliliters": "1/1000",
               "gallon gallons gal": "3.785411784"},
    "money": {"dollar dollars usd bucks": "1", "cent cents": "1/100"},
    "angle": {"rad radian radians": "1"},
    "force": {"N newton newtons": "1"},
    "energy": {"J joule joules": "1", "kJ": "1000"},
    "power": {"W watt watts": "1", "kW": "1000"},
    "voltage": {"V volt volts": "1"},
    "frequency": {"Hz hertz": "1"},
    "speed": {"mph": "0.44704", "kph kmh": "5/18"},
}  # fmt: skip

UNITS: dict[str, Unit] = {
    word: Unit(((dimension, 1),), Fraction(scale))
    for dimension, rows in _TABLE.items()
    for words, scale in rows.items()
    for word in words.split()
}
UNITS["mph"] = UNITS["kph"] = UNITS["kmh"] = Unit((("length", 1), ("time", -1)), Fraction(1))
UNITS["mph"] = UNITS["mph"]._replace(scale=Fraction("0.44704"))
UNITS["kph"] = UNITS["kmh"] = UNITS["kph"]._replace(scale=Fraction(5, 18))
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
MULTIPLIERS = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
SHORT = {
    word for word in UNITS if len(word) > 1
}  # words that are units even when printed without \text
MONEY = UNITS["dollars"]


def unit_of(word: str) -> Unit:
    """The unit a word names, else a label."""
    return UNITS.get(word) or UNITS.get(word.lower()) or LABEL


def raised(unit: Unit, power: int) -> Unit:
    return Unit(tuple((name, p * power) for name, p in unit.powers if p * power), unit.scale**power)


def times(first: Unit, second: Unit) -> Unit:
    """The product of two units; with a label, nothing is known."""
    if not (first.known and second.known):
        return LABEL
    powers = dict(first.powers)
    for name, power in second.powers:
        powers[name] = powers.get(name, 0) + power
    kept = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(kept, first.scale * second.scale)
