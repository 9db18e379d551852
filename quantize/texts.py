"""Texts that calibration runs on where the user gives none: sentences for language, prompts for pictures."""

from __future__ import annotations

from collections.abc import Sequence

from optimize.errors import InputError

SEEDS = 1 << 20
"""Users' seeds lie below."""
HELD, MEASURED = SEEDS, 2 * SEEDS
"""Added to the seeds of what figures are of: those that choose the layers, and those of `evaluate` and `profile`."""
SHARE = 4


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that is none of a user's."""
    if not 0 <= seed < SEEDS:
        raise InputError("--seed does not fit", got=seed, expected=f"0 to {SEEDS - 1}", mend="--seed 0")


def share_of(texts: Sequence[str], seed: int) -> tuple[str, ...]:
    """The texts for data of that seed: every fourth one is for figures alone, no calibration sees it."""
    return tuple(t for i, t in enumerate(texts) if (i % SHARE == SHARE - 1) == (seed >= SEEDS))


SENTENCES: tuple[str, ...] = (
    "The train to the coast leaves at seven and arrives before noon.",
    "How do I reset the password of my account?",
    "She put the kettle on, opened the window and listened to the rain.",
    "Water boils at a lower temperature in the mountains because the air is thinner.",
    "Thanks!",
    "The committee postponed its decision until the figures for the third quarter are known.",
    "My grandmother kept bees behind the house, and every August we ate honey straight from the comb.",
    "Which of these two phones has the better camera?",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "The goalkeeper dived to the left, but the ball had already changed direction.",
    "Please find the signed contract attached; we look forward to working with you.",
    "A recession is usually defined as two quarters in a row of falling output.",
    "def add(a, b): return a + b",
    "He never said that he would come; he said that he might.",
    "The museum is closed on Mondays, except when Monday is a public holiday.",
    "Add the flour little by little, and stir until the dough no longer sticks to the bowl.",
    "The patient reports a dull pain in the lower back that gets worse when sitting.",
    "No.",
    "In 1969 two people walked on the moon while a third one waited for them in orbit.",
    "The film is far too long, yet its last ten minutes are worth the wait.",
    "Interest is paid on the first day of each month unless that day is a Sunday.",
    "Snow fell all night, and in the morning nobody could find the road.",
    "What is the difference between a virus and a bacterium?",
    "The new bridge carries twelve thousand cars a day, three times as many as were planned for.",
    "I bought it last week and it stopped working after two days. Very disappointed.",
    "A triangle whose sides are 3, 4 and 5 units long has a right angle.",
    "They argued about politics until the restaurant closed.",
    "The orchestra tuned, the lights went down, and somebody's telephone began to ring.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY name;",
    "Whales are mammals: they breathe air and feed their young with milk.",
    "The landlord may end the lease with three months' notice, in writing, and only for a good reason.",
    "It was the best soup that I have ever eaten, and I have eaten a lot of soup.",
    "Turn left at the church, cross the bridge, and you will see the station on your right.",
    "Sales rose by 4.2 % in May, after a fall of 1.8 % in April.",
    "Why is the sky blue?",
    "The old man repaired clocks, though he himself was always late.",
    "Quantum mechanics describes how matter behaves at the scale of atoms.",
    "Our flight was cancelled, so we rented a car and drove through the night.",
    "Keep out of reach of children. Do not exceed the stated dose.",
    "The city council wants to plant ten thousand trees along its streets within five years.",
    "Dogs can hear sounds that are far too high for people.",
    "If you had told me earlier, I would have saved you a seat.",
    "The error occurs only when two requests arrive within the same millisecond.",
    "Rice is the most important food of more than half of the people on earth.",
    "Great service, friendly staff, and the room had a view of the lake!",
    "The novel tells the story of three sisters who inherit a lighthouse.",
    "A neural network is a function with many numbers in it that were chosen by looking at examples.",
    "The court found that the company had known of the defect for years.",
    "Could you send me the minutes of yesterday's meeting?",
    "Mount Everest grows by about four millimetres a year.",
    "He plays the violin, the viola and, when nobody is listening, the accordion.",
    "Battery: 5000 mAh; weight: 187 g; display: 6.1 inches.",
    "The river had left its bed during the storm, and the fields stood under water.",
    "Vaccines teach the body to recognise an enemy that it has not met yet.",
    "Two plus two is four.",
    "The shop on the corner sells newspapers, umbrellas and surprisingly good coffee.",
    "Unemployment among young people is twice as high as in the population as a whole.",
    "As soon as the paint is dry, sand it lightly and put on a second coat.",
    "The astronomer pointed the telescope at a part of the sky where nothing had ever been seen.",
    "To whom it may concern: I hereby confirm that Ms Novak worked with us from March to October.",
    "Cats sleep for twelve to sixteen hours a day.",
    "The price includes breakfast, but not the tourist tax of two euros per night.",
    "Once upon a time there was a tailor who was afraid of scissors.",
    "We measured the same quantity with three instruments and got three different answers.",
)
"""Of many kinds and lengths: statements, questions, letters, reviews, law, science, code."""

PROMPTS: tuple[str, ...] = (
    "a photograph of a lighthouse on a cliff at sunset",
    "a bowl of oranges on a wooden table, oil painting",
    "a red tractor in a wheat field under a cloudy sky",
    "portrait of an old fisherman, black and white, soft light",
    "a cat asleep on a windowsill",
    "a narrow street in an old town after rain, reflections of lamps",
    "an isometric drawing of a small library",
    "a sailing boat in a storm, watercolour",
    "a close photograph of a bee on a lavender flower",
    "a snowy mountain above a calm lake, wide view",
    "a bicycle leaning against a brick wall",
    "a steaming cup of coffee and an open book",
    "a medieval map of an island",
    "two children flying a kite on a beach",
    "a modern house of glass and concrete in a forest",
    "a steam locomotive crossing a stone bridge",
    "a plate of pasta with tomatoes and basil, from above",
    "an astronaut riding a horse on the moon",
    "a market stall full of vegetables, early morning",
    "a pencil sketch of a pair of hands",
    "a city skyline at night seen from a river",
    "a parrot with bright green feathers on a branch",
    "a desert with a single tree, long shadows",
    "a stained glass window with a blue star",
)

DIGITS = tuple(
    f"a handwritten {word}" for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
"""What the demo pipeline was trained on."""
