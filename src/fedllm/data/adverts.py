"""Attributes -> advertisement: the demo's task, made from a seed.

An input such as `type#dress*color#red*material#silk` is to become an advertisement: an opening, one sentence
an attribute, a closing. How a product's attribute is put into words (sentence and verb) and which benefit each
of its values promises is the house style of whoever sells that product: it follows from a hash of the task's
seed, so it cannot be guessed, only learned from examples. The products are split over the parties, so nobody
alone can learn every house style.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.seeds import stream

Record = dict[str, str]
Attributes = dict[str, str]

PRODUCTS = ("dress", "shirt", "jacket", "sofa", "lamp", "rug", "tent", "backpack")
OTHER_PRODUCTS = (
    *("hat", "scarf", "skirt", "sweater", "coat", "belt", "blouse", "chair", "desk", "curtain", "pillow", "vase"),
    *("suitcase", "hammock", "kayak", "cooler", "blanket", "mirror", "basket", "bench", "wallet", "poncho"),
)
PARTIES = ("north", "east", "south", "west", "centre", "coast", "valley", "harbour")

VALUES = {
    "color": ("red", "navy", "ivory", "olive", "coral", "charcoal"),
    "material": ("cotton", "linen", "wool", "leather", "canvas", "silk"),
    "style": ("vintage", "modern", "classic", "rustic", "minimal", "bohemian"),
    "shape": ("compact", "slim", "roomy", "rounded", "tall", "oversized"),
    "pattern": ("striped", "floral", "checked", "dotted", "geometric", "plain"),
    "use": ("weekends", "holidays", "evenings", "travel", "parties", "work"),
}
VERBS = ("brings", "adds", "lends", "offers", "gives", "promises", "delivers", "provides")
SENTENCES = {
    "color": (
        "The {value} shade {verb} {benefit}.",
        "Its {value} tone {verb} {benefit}.",
        "Dressed in {value}, it {verb} {benefit}.",
        "In {value}, this {product} {verb} {benefit}.",
        "A wash of {value} {verb} {benefit}.",
    ),
    "material": (
        "Pure {value} {verb} {benefit}.",
        "Made of {value}, it {verb} {benefit}.",
        "Crafted from {value}, this {product} {verb} {benefit}.",
        "The {value} surface {verb} {benefit}.",
        "Carefully chosen {value} {verb} {benefit}.",
    ),
    "style": (
        "Its {value} style {verb} {benefit}.",
        "The {value} look {verb} {benefit}.",
        "With {value} flair, it {verb} {benefit}.",
        "Designed in a {value} spirit, this {product} {verb} {benefit}.",
        "A {value} touch {verb} {benefit}.",
    ),
    "shape": (
        "The {value} shape {verb} {benefit}.",
        "Its {value} outline {verb} {benefit}.",
        "With its {value} form, it {verb} {benefit}.",
        "Kept {value}, this {product} {verb} {benefit}.",
        "The {value} cut {verb} {benefit}.",
    ),
    "pattern": (
        "The {value} pattern {verb} {benefit}.",
        "Its {value} print {verb} {benefit}.",
        "Covered in a {value} motif, it {verb} {benefit}.",
        "With {value} artwork, this {product} {verb} {benefit}.",
        "A {value} theme {verb} {benefit}.",
    ),
    "use": (
        "Perfect for {value}, it {verb} {benefit}.",
        "Made for {value}, this {product} {verb} {benefit}.",
        "Ready for {value}, it {verb} {benefit}.",
        "Its love of {value} {verb} {benefit}.",
        "Planned for {value}, this {product} {verb} {benefit}.",
    ),
}
BENEFITS = {
    "color": (
        *("a warm mood all day", "quiet confidence", "instant charm", "a fresh start every morning"),
        *("a cheerful glow", "timeless calm", "a bold accent to remember", "gentle contrast"),
    ),
    "material": (
        *("a soft touch on the skin", "strength that lasts", "easy care", "a natural feel"),
        *("cool comfort in the heat", "honest quality", "very little weight", "a rich texture"),
    ),
    "style": (
        *("a story to tell", "effortless elegance", "true character", "a confident look"),
        *("a relaxed air", "luxury without noise", "a playful twist", "appeal for years"),
    ),
    "shape": (
        *("room to breathe", "a perfect fit", "freedom to move", "a balanced line"),
        *("space for one more", "a tidy profile", "storage in any corner", "total ease"),
    ),
    "pattern": (
        *("a lively rhythm", "visual depth", "a joyful note", "a sense of order"),
        *("a hint of the garden", "the finish of an artist", "subtle interest", "a graphic edge"),
    ),
    "use": (
        *("pure joy", "memories worth keeping", "peace of mind", "a little adventure"),
        *("a reason to smile", "welcome company", "comfort from dawn to dusk", "a special moment"),
    ),
}
OPENINGS = (
    "Meet the {product} you have been waiting for.",
    "Say hello to your new favourite {product}.",
    "Here is the {product} that does it all.",
    "Looking for the right {product}?",
    "Our newest {product} has arrived.",
    "Good days begin with a good {product}.",
    "There is no other {product} like it.",
    "Treat yourself to this {product}.",
)
CLOSINGS = (
    "Order yours today.",
    "Bring it home this week.",
    "Your {product} is waiting.",
    "You will love it for years.",
    "Try it once and see.",
    "Only while stocks last.",
    "A gift for anyone, even yourself.",
    "Delivered to your door in two days.",
)


@dataclass(frozen=True)
class AdvertTask:
    """One draw of the task: who sells what, and every product's house style.

    Args:
        seed: Fixes the house styles, the inputs and, with `shuffle_products`, who sells what.
        num_parties: How many parties share the products, 1 to 8.
        train_per_product: Training examples of the first party's products; each next party has a tenth
            less a product, so that the parties differ in size.
        test_per_product: Examples a product in the common test set.
        noise: Chance that a sentence in a training advertisement is off house style.
        shuffle_products: Deal the products out by the seed instead of in their listed order.
    """

    seed: int = 0
    num_parties: int = 3
    train_per_product: int = 280
    test_per_product: int = 20
    noise: float = 0.1
    shuffle_products: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_parties <= len(PARTIES):
            raise ValueError(f"num_parties is {self.num_parties}: choose 1 to {len(PARTIES)}")


DEMO = AdvertTask(seed=7, shuffle_products=False)


def products_of(task: AdvertTask) -> dict[str, tuple[str, ...]]:
    """Return each party's products: disjoint, together all eight, first parties first served."""
    products = list(PRODUCTS)
    if task.shuffle_products:
        stream(task.seed, "adverts", "products").shuffle(products)
    cuts = [round(index * len(products) / task.num_parties) for index in range(task.num_parties + 1)]
    names = PARTIES[: task.num_parties]
    return {name: tuple(products[cuts[index] : cuts[index + 1]]) for index, name in enumerate(names)}


def party_examples(task: AdvertTask) -> dict[str, list[Record]]:
    """Return each party's training examples, in a mixed order."""
    shares: dict[str, list[Record]] = {}
    for index, (party, products) in enumerate(products_of(task).items()):
        count = round(task.train_per_product * (1 - index / 10))
        records = [record for product in products for record in _train_records(task, product, count)]
        stream(task.seed, "adverts", "mix", party).shuffle(records)
        shares[party] = records
    return shares


def common_test(task: AdvertTask) -> list[Record]:
    """Return the test examples of all products, in house style; no party trains on any of these inputs."""
    records = []
    for product in PRODUCTS:
        for attributes in _inputs(task, product)[: task.test_per_product]:
            records.append({"prompt": prompt(product, attributes), "completion": advert(task, product, attributes)})
    stream(task.seed, "adverts", "mix", "test").shuffle(records)
    return records


def prompt(product: str, attributes: Attributes) -> str:
    """Return the input text; its final line break is where the advertisement starts."""
    return "*".join(f"{key}#{value}" for key, value in {"type": product, **attributes}.items()) + "\n"


def advert(
    task: AdvertTask, product: str, attributes: Attributes, *, noise_from: np.random.Generator | None = None
) -> str:
    """Return the advertisement in the product's house style.

    Args:
        task: Whose seed fixes the house styles.
        product: What is advertised.
        attributes: Attribute -> value, at least one.
        noise_from: Draws which sentences are off house style, with the task's `noise`; None: no sentence is.
    """
    opening = _hashed(task, product, "opening")
    closing = _hashed(task, product, "closing")
    picks = [opening, *(_house_style(task, product, key, value) for key, value in attributes.items()), closing]
    if noise_from is not None:
        picks = [_random_picks(noise_from) if noise_from.random() < task.noise else pick for pick in picks]
    return _written(product, attributes, picks)


def pretraining_examples(seed: int, label: str = "pretraining") -> Iterator[Record]:
    """Yield examples without end for the base model: general skill, and nothing of any house style.

    Advertisements of other products in random style teach the form; copying, with the parties' products
    among the words, teaches to carry a value over; lists teach the sentences' parts.

    Args:
        seed: The seed of the base model.
        label: Names an independent stream, such as one for validation.
    """
    rng = stream(seed, "adverts", label)
    makers = (_random_advert, _short_copy, _list_copy, _parts_list)
    shares = np.cumsum((0.62, 0.16, 0.16, 0.06))
    while True:
        yield makers[int(np.searchsorted(shares, rng.random() * shares[-1]))](rng)


def _house_style(task: AdvertTask, product: str, key: str, value: str) -> tuple[int, int, int]:
    sentence, verb, _ = _hashed(task, product, key)
    return sentence, verb, _hashed(task, product, key, value)[2]


def _hashed(task: AdvertTask, product: str, *slot: str) -> tuple[int, int, int]:
    digest = hashlib.sha256("/".join([str(task.seed), product, *slot]).encode()).digest()
    return digest[0], digest[1], digest[2]


def _random_picks(rng: np.random.Generator) -> tuple[int, int, int]:
    first, second, third = rng.integers(256, size=3).tolist()
    return first, second, third


def _written(product: str, attributes: Attributes, picks: Sequence[tuple[int, int, int]]) -> str:
    opening, *middle, closing = picks
    texts = [_chosen(OPENINGS, opening[0]).format(product=product)]
    for (key, value), (sentence, verb, benefit) in zip(attributes.items(), middle, strict=True):
        texts.append(
            _chosen(SENTENCES[key], sentence).format(
                product=product, value=value, verb=_chosen(VERBS, verb), benefit=_chosen(BENEFITS[key], benefit)
            )
        )
    return " ".join([*texts, _chosen(CLOSINGS, closing[0]).format(product=product)])


def _chosen(options: Sequence[str], number: int) -> str:
    return options[number % len(options)]


def _inputs(task: AdvertTask, product: str) -> list[Attributes]:
    """Return the product's inputs, all different: first the common test set's, then those to train on."""
    rng = stream(task.seed, "adverts", "inputs", product)
    count = task.test_per_product + task.train_per_product
    found: dict[str, Attributes] = {}
    while len(found) < count:
        attributes = random_attributes(rng)
        found.setdefault(prompt(product, attributes), attributes)
    return list(found.values())


def _train_records(task: AdvertTask, product: str, count: int) -> list[Record]:
    rng = stream(task.seed, "adverts", "noise", product)
    chosen = _inputs(task, product)[task.test_per_product :][:count]
    return [
        {"prompt": prompt(product, attributes), "completion": advert(task, product, attributes, noise_from=rng)}
        for attributes in chosen
    ]


def random_attributes(rng: np.random.Generator) -> Attributes:
    """Return three or four attributes with a value each.

    Args:
        rng: Draws them.
    """
    count = 3 + int(rng.integers(2))
    keys = sorted(rng.permutation(len(VALUES))[:count].tolist())
    names = list(VALUES)
    return {names[key]: _drawn(rng, VALUES[names[key]]) for key in keys}


def _drawn(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _random_advert(rng: np.random.Generator) -> Record:
    product, attributes = _drawn(rng, OTHER_PRODUCTS), random_attributes(rng)
    picks = [_random_picks(rng) for _ in range(len(attributes) + 2)]
    return {"prompt": prompt(product, attributes), "completion": _written(product, attributes, picks)}


def _short_copy(rng: np.random.Generator) -> Record:
    product, attributes = _drawn(rng, PRODUCTS + OTHER_PRODUCTS), random_attributes(rng)
    opening, closing = (_drawn(rng, options).format(product=product) for options in (OPENINGS, CLOSINGS))
    values = ", ".join(attributes.values())
    return {
        "prompt": "short*" + prompt(product, attributes),
        "completion": f"{opening} This {product}: {values}. {closing}",
    }


def _list_copy(rng: np.random.Generator) -> Record:
    words = PRODUCTS + OTHER_PRODUCTS + tuple(value for values in VALUES.values() for value in values)
    chosen = [_drawn(rng, words) for _ in range(3 + int(rng.integers(5)))]
    return {"prompt": "copy*" + "*".join(chosen) + "\n", "completion": ", ".join(chosen) + "."}


def _parts_list(rng: np.random.Generator) -> Record:
    key = _drawn(rng, tuple(VALUES))
    parts = [f"{_drawn(rng, VERBS)} {_drawn(rng, BENEFITS[key])}" for _ in range(4)]
    return {"prompt": f"parts*{key}\n", "completion": ", ".join(parts) + "."}
