"""Units of measure, words of counting and words for numbers.

A unit says what a number counts and is no part of its value: 18 answers "18 dollars". When both
sides name a unit, the units must agree: in² is not cm². Words that are in none of these tables
(apples, eggs per day) count things and are ignored.
"""
from __future__ import annotations

from collections.abc import Sequence

SPELLINGS = {  # the unit → other spellings of it
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres cms",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards yds",
    "mi": "mile miles",
    "g": "gram grams",
    "kg": "kilogram kilograms kgs kilo kilos",
    "mg": "milligram milligrams",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "ton": "tons tonne tonnes",
    "l": "L liter liters litre litres",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "gal": "gallon gallons",
    "pt": "pint pints",
    "qt": "quart quarts",
    "s": "sec secs second seconds",
    "ms": "millisecond milliseconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks wk wks",
    "month": "months",
    "year": "years yr yrs",
    "decade": "decades",
    "mph": "",
    "kph": "kmh",
    "hz": "Hz hertz",
    "khz": "kHz",
    "mhz": "MHz",
    "n": "N newton newtons",
    "j": "J joule joules",
    "kj": "kJ",
    "w": "W watt watts",
    "kw": "kW",
    "v": "V volt volts",
    "pa": "Pa",
    "k": "K kelvin",
    "c": "C celsius",
    "f": "F fahrenheit",
    "mol": "moles",
    "ev": "eV",
    "rad": "radian radians",
    "°": "degree degrees deg",
    "%": "percent pct percentage",
    "$": "¤ dollar dollars usd USD bucks",
    "¢": "cent cents",
    "€": "euro euros eur EUR",
    "£": "gbp GBP",
    "¥": "yen yuan",
    "₹": "rupee rupees rs Rs",
    "am": "a.m. AM",
    "pm": "p.m. PM",
}
UNITS = {name: unit for unit, names in SPELLINGS.items() for name in [unit, *names.split()]}
MONEY = ("$", "¢", "€", "£", "¥", "₹")
LETTERS = "mgshlLNJWVKCF"  # units of one letter, which could also be variables

MULTIPLES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}
MULTIPLES |= {f"{name}s": value for name, value in MULTIPLES.items()}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {name: value for value, name in enumerate(ONES)}
NUMBERS |= {name: 10 * tens for tens, name in enumerate(TENS, 2)}
ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth".split()
PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}  # of one half, three quarters
PARTS |= {name + plural: value for value, name in enumerate(ORDINALS, 3) for plural in ("", "s")}

SHORT = set(  # words of two and three letters that are no product of variables
    "all and any are as at be boy box but by can car cat cow cup day dog egg far few for fly fox "
    "from girl hat he hen her his if is it job key kid kit lap leg log man map max men mug net new "
    "no none not nut odd of off oil old on or out owl pad pan pen per pie pig pin pot rat red row "
    "sq cu she ski so sum tea ten the to toy tub two up us van via was way win yes you zip".split()
)
CHANGES = set(  # after a number they make another value of it, or leave it open
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths eighth "
    "eighths tenth tenths hundredth hundredths thousandth thousandths squared cubed factorial "
    "plus minus divided multiplied mod modulo root to than not if unless either between "
    "or and but maybe perhaps probably possibly least most about almost nearly except without "
    "power score exponent short negative infinity point double triple twice base binary octal "
    "hexadecimal".split()
)


def value_in_words(words: Sequence[str]) -> tuple[int, int]:
    """The value of the number that the words begin with, and how many of them it takes.

    >>> value_in_words("two thousand one hundred and five apples".split())
    (2105, 6)
    >>> value_in_words(["twenty", "-", "one"]), value_in_words(["one", "and", "two"])
    ((21, 3), (1, 1))
    """
    total = part = used = 0
    for i, word in enumerate(words):
        open_part = part % 100 == 0 or (part % 100 >= 20 and part % 10 == 0)
        hundred = word == "hundred" and 0 < part < 100
        multiple = not hundred and word in MULTIPLES and part > 0
        added = word in NUMBERS and open_part
        joining = word == "-" or (word == "and" and i > 0 and words[i - 1] in MULTIPLES)
        if not (hundred or multiple or added or joining):
            break
        if hundred:
            part *= 100
        if multiple:
            total, part = total + part * MULTIPLES[word], 0
        if added:
            part += NUMBERS[word]
        if word not in ("-", "and"):
            used = i + 1
    return total + part, used


def unit_of(words: Sequence[str]) -> list[str]:
    """The known units among the words of counting.

    >>> unit_of(["dollars", "per", "day"]), unit_of(["square", "inches"]), unit_of(["apples"])
    (['$', 'day'], ['in', '^2'], [])
    """
    found: list[str] = []
    power = unit = ""
    for word in words:
        measured = unit
        unit = UNITS.get(word) or UNITS.get(word.lower()) or ""
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word.startswith("sq") else "^3"
        elif word.startswith("^"):
            found += [word] if measured else []
        elif unit:
            found += [unit, power] if power else [unit]
            power = ""
    return found


def agree(gold: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether the units do not contradict each other.

    >>> agree(["cm", "^2"], []), agree(["in", "^2"], ["cm", "^2"]), agree(["$"], ["$", "day"])
    (True, False, True)
    """
    if gold and answer and gold[0] in MONEY and answer[0] in MONEY:
        return gold[0] == answer[0]
    return not gold or not answer or list(gold) == list(answer)
