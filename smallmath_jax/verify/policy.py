"""What counts as equal where mathematics leaves a choice: one switch each, all stated here."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Policy:
    """Defaults as shown. No switch brings in a relative tolerance, or a factor of 100 between plain numbers."""

    percent_as_number: bool = True  # 28% equals 28 (it always equals 0.28)
    decimal_digits: int = (
        6  # a decimal of that many significant digits may stand for what it rounds; 0: never
    )
    degrees_as_radians: bool = False  # 60 degrees equal pi/3 (inside sin, cos .. they always do)
    match_units: bool = (
        True  # 5 m differs from 5 kg and 5 cm; a missing or unknown unit matches any
    )
    named_value: bool = True  # x = 5 equals 5
    sets_as_tuples: bool = False  # {1, 2} equals (1, 2)
    vector_as_tuple: bool = True  # a column equals the tuple of its entries
    interval_as_inequality: bool = True  # x < 3 equals (-oo, 3)
    ratio_as_fraction: bool = True  # 1:2 equals 1/2
    base_optional: bool = False  # 204 equals 204_5
    choice_with_text: bool = True  # where the gold is A, "(A) 5" is A
    set_of_one: bool = True  # {2} equals 2


DEFAULT = Policy()
