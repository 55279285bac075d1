"""Catalogue -> letter: the task of offsite tuning, made from a seed.

The owner's model has learnt a catalogue by heart: how each product is advertised (`fedllm.data.adverts`, one draw of
its house styles). The other parties want letters to customers: the catalogue's sentences with a
farewell. Each of them has letters about some of the products only. So what is to be learnt from them is little, the
form of a letter, and most of what a good letter needs is knowledge that the owner's model has already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedllm.data.adverts import (
    OTHER_PRODUCTS,
    PRODUCTS,
    AdvertTask,
    Record,
    advert,
    pretraining_examples,
    prompt,
    random_attributes,
)
from fedllm.seeds import stream

CATALOGUE = AdvertTask(seed=11)
KNOWN = (*PRODUCTS, *OTHER_PRODUCTS[:6])
# Who has letters about what. About `UNSEEN` nobody has any: what is said of them is what the owner's model knows.
SHARES = {"north": PRODUCTS[:2], "east": PRODUCTS[2:4], "south": PRODUCTS[4:6]}
UNSEEN = KNOWN[6:]
# Of what the model is taught of the catalogue with, so much is of it; the rest keeps the general skill.
_KNOWLEDGE = 0.85


def catalogue_examples(seed: int, label: str = "catalogue") -> Iterator[Record]:
    """Yield examples without end for the owner's model: the catalogue, and the general skill of `adverts`.

    Args:
        seed: The seed of the base model.
        label: Names an independent stream, such as one for validation, or for public text.
    """
    rng, general = stream(seed, "letters", label), pretraining_examples(seed, f"letters {label}")
    while True:
        if rng.random() >= _KNOWLEDGE:
            yield next(general)
            continue
        product, attributes = KNOWN[int(rng.integers(len(KNOWN)))], random_attributes(rng)
        yield {"prompt": prompt(product, attributes), "completion": advert(CATALOGUE, product, attributes)}


def letters(seed: int, label: str, *, products: Sequence[str], count: int) -> list[Record]:
    """Return letters, each about one product, with inputs that are drawn at random.

    Args:
        seed: Of the draws; the catalogue is always the same.
        label: Names an independent stream, such as a party.
        products: What they are about.
        count: How many.
    """
    rng, found = stream(seed, "letters", label), list[Record]()
    for _ in range(count):
        product, attributes = products[int(rng.integers(len(products)))], random_attributes(rng)
        text = advert(CATALOGUE, product, attributes)
        letter = f"{text} Yours, the {product} team."
        found.append({"prompt": prompt(product, attributes), "completion": letter})
    return found
