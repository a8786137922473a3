"""Queries of the demonstration: a few hundred, of many kinds, made from patterns written for it."""

from __future__ import annotations

from itertools import product

_TRADES = ("baker", "plumber", "florist", "cyclist", "beekeeper", "printer", "gardener", "tailor")
_AMOUNTS = (3, 7, 12, 18, 25, 40)
_WORDS = ("anagram", "level", "proteus", "balance")
_TOPICS = ("photosynthesis", "compound interest", "plate tectonics", "the French Revolution", "vaccination", "entropy")
_PLACES = ("Lisbon", "Nairobi", "Kyoto", "Oslo")
_SNIPPETS = (
    "def f(xs):\n    return [x * 2 for x in xs if x % 3]",
    "def f(s):\n    out = ''\n    for c in s:\n        out = c + out\n    return out",
    "def f(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "def f(d):\n    return {v: k for k, v in sorted(d.items())}",
)
_INPUTS = ("[1, 2, 3, 4]", "'routing'", "10", "{'b': 1, 'a': 2}")
_HOUSES = ("three", "four", "five")
_POLYNOMIALS = ("x^3 - 6x^2 + 11x - 6", "2x^2 - 8x + 6", "x^4 - 5x^2 + 4", "x^2 + 1")

_CHOICE = "\nA. {}\nB. {}\nC. {}\nD. {}"


def queries() -> list[str]:
    """All queries, in a fixed order."""
    made: list[str] = []
    made += [
        f"A {trade} sells {amount} orders on Monday and twice as many on Tuesday. Each order brings ${amount + 2}."
        " How much money is that in all?"
        for trade, amount in product(_TRADES, _AMOUNTS)
    ]
    made += [
        f"The {trade} starts with ${10 * amount}, spends a quarter on supplies, earns 30% on what is left and then"
        " gives $5 to a friend. How many dollars are left?"
        for trade, amount in product(_TRADES, _AMOUNTS)
    ]
    made += [
        f"What does f({value}) return, or which error does it raise?\n\n{snippet}"
        for snippet, value in product(_SNIPPETS, _INPUTS)
    ]
    made += [
        f"Let p(x) = {polynomial}. {ask}"
        for polynomial, ask in product(
            _POLYNOMIALS,
            (
                "Find the sum of the squares of its roots.",
                "How many distinct real roots does it have?",
                "What is the remainder when p(x) is divided by x - 2?",
                "Compute the definite integral of p from 0 to 1.",
                "Find all x with p(x) = p(-x).",
            ),
        )
    ]
    made += [
        f"There are {count} houses in a row, each with another colour, owner, drink and pet. The {trade} lives directly"
        f" left of the red house. The person who drinks tea owns the cat. The {other} does not drink milk and lives at"
        " one end. The owner of the fish lives in the second house. Who drinks tea?"
        for count, trade, other in product(_HOUSES, _TRADES[:5], _TRADES[5:])
    ]
    made += [
        f"Which statement about {topic} is correct?"
        + _CHOICE.format("It is never observed.", f"It {verb}.", "It was disproved in 1900.", "None of the others.")
        for topic, verb in product(
            _TOPICS, ("can be measured", "depends on its surroundings", "has a cost", "is taught in schools")
        )
    ]
    made += [
        f"Explain {topic} {manner}."
        for topic, manner in product(
            _TOPICS, ("to a child of eight", "in two sentences", "with one worked example", "and name a common mistake")
        )
    ]
    made += [
        f"{ask} {place}" + ("?" if ask.startswith(("What", "How", "Is")) else ".")
        for place, ask in product(
            _PLACES,
            ("What is the time difference between London and", "Write a short poem about", "Plan one rainy day in",
             "How long is the flight from Madrid to", "Is the tap water safe to drink in"),
        )
    ]  # fmt: skip
    made += [
        f"How many times does the letter '{letter}' occur in the word \"{word}\"?"
        for word, letter in product(_WORDS, "aelo")
    ]
    made += [
        f'Translate into {language}: "The {trade}\'s shop is closed on the first Monday of the month."'
        for language, trade in product(("French", "German", "日本語", "العربية"), _TRADES[:4])
    ]
    made += [
        "",
        "hi",
        "🙂🙂🙂",
        "SELECT name, count(*) FROM orders GROUP BY name HAVING count(*) > 3; -- what does this return?",
        "Prove that the square root of 2 is irrational.",
        "A bat and a ball cost $1.10 together and the bat costs $1 more than the ball. What does the ball cost?",
        "If all bloops are razzies and all razzies are lazzies, are all bloops lazzies?",
        "Find the number of integers n with 1 <= n <= 2024 for which n^2 + n is divisible by 12.",
    ]
    return made
